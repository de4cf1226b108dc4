"""The dataclasses that modules exchange: frozen, without torch and I/O.

They are in the order of the data flow: records → what a client reveals → messages of a round → contents of a
bundle → decisions.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Float64s = NDArray[np.float64]
MAX_LABEL = 200  # characters
AdapterState = Mapping[str, Array]
"""LoRA tensors by PEFT's names (``base_model.model…lora_A.weight``), float32."""


A_NAME = f"expected a printable name on one line, up to {MAX_LABEL} characters"


def is_label(text: str) -> bool:
    """Return whether a text can name a task or a client: printable, one line, at most ``MAX_LABEL`` long."""
    return text.isprintable() and 0 < len(text) <= MAX_LABEL


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation; ``content`` is text only."""

    role: str  # "system" | "user" | "assistant" | "tool"
    content: str
    more: Mapping[str, Any] = field(default_factory=dict)  # other keys for chat templates: tool_calls, name …
    learned: bool = True  # whether an assistant turn carries loss


@dataclass(frozen=True, slots=True)
class Record:
    """One training or test example."""

    turns: tuple[Turn, ...]  # the conversation before the answer, with at least one user turn with text
    completion: str  # the answer's text; JSON of the tool calls if there is no text
    task: str | None = None  # label for names and scores; never used to cluster or to route
    answer: Turn | None = None  # None if the answer is only text
    tools: tuple[Mapping[str, Any], ...] = ()  # JSON schemas for chat templates
    where: str = field(default="", compare=False, repr=False)  # file and row

    @property
    def conversation(self) -> tuple[Turn, ...]:
        """All turns, the answer last."""
        return (*self.turns, self.answer or Turn("assistant", self.completion))


@dataclass(frozen=True, slots=True)
class LocalClusters:
    """What a client reveals of its rows: local clusters (paper: μ_{c,j}, n_{c,j})."""

    counts: Float64s  # (m,), rows per cluster
    centroids: Float64s  # (m, d), of embedded prompts; zeros where the count is 0
    scatter: Float64s  # (d, d), sum of (x - centroid)(x - centroid)ᵀ over the rows of all clusters


@dataclass(frozen=True, slots=True)
class RoutingSpace:
    """The space in which distances are measured: z = (φ(x) - mean) @ transform."""

    mean: Array  # (d,)
    transform: Array  # (d, m)
    centroids: Array  # (n, m), in the transformed space
    cluster_of: tuple[int, ...]  # (n,), the task cluster of each centroid
    map: Array | None = None  # (m, 2): z @ map is the position of z in figures; None in older bundles

    @property
    def num_clusters(self) -> int:
        """Number of task clusters."""
        return max(self.cluster_of) + 1

    def project(self, x: NDArray[Any]) -> NDArray[Any]:
        """Map embedded prompts (n, d) to the space: (n, m), in the wider of both dtypes."""
        return np.asarray((x - self.mean) @ self.transform)


@dataclass(frozen=True, slots=True)
class Member:
    """A client's answer to the roll call at the start of a run."""

    client: str
    num_rows: int
    digest: str  # changes with the client's rows; keyed with the client's secret, so it reveals nothing else


@dataclass(frozen=True, slots=True)
class Reread:
    """A client's answer to the request to read its rows again."""

    client: str
    problem: str | None  # why it keeps its old rows, without quoting them; None: it has read its rows again


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a client's rows are distributed over existing task clusters."""

    client: str
    within: Mapping[int, int]  # task cluster → rows within its radius; without counts too small to reveal
    num_beyond: int  # rows beyond every radius; 0 if too few to reveal
    may_summarise: bool  # whether the rows beyond every radius are enough for a local cluster


@dataclass(frozen=True, slots=True)
class Membership:
    """Predefined task clusters, for the baselines: by client or by task label."""

    clients: Mapping[str, tuple[int, ...]]  # task clusters of all rows of a client; prompts go to the first
    tasks: Mapping[str, int]  # task cluster of all rows with a label
    num: int  # number of task clusters that prompts are routed to; later ones are only trained


@dataclass(frozen=True, slots=True)
class Subset:
    """What a client reveals of its rows in one task cluster (paper: D_{c,j})."""

    cluster: int  # the task cluster
    num_examples: int
    distances: Array  # (101,), quantiles 0 %, 1 % … 100 % of the distance to the nearest centroid
    task_counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Assignment:
    """A client's answer to the routing space: its rows by task cluster."""

    client: str
    subsets: tuple[Subset, ...]  # non-empty ones, by task cluster


@dataclass(frozen=True, slots=True)
class TrainRequest:
    """The server's request that a client trains a task cluster's adapter on its subset, in one round."""

    client: str
    cluster: int  # the task cluster
    round: int  # from 0
    adapter: AdapterState
    steps: int
    learning_rate: float


@dataclass(frozen=True, slots=True)
class TrainReply:
    """The client's reply with the trained adapter."""

    client: str
    cluster: int
    adapter: AdapterState
    num_examples: (
        int  # examples trained on in this round, the weight of the update; with noise, those requested
    )
    loss: float | None  # mean training loss over the steps, nats per token; None with noise
    seconds: float  # 0 with noise


@dataclass(frozen=True, slots=True)
class TrainFailure:
    """The client's reply if it could not train; it misses this round, but the run continues."""

    client: str
    cluster: int
    reason: str  # one line; must not quote the client's rows


@dataclass(frozen=True, slots=True)
class ValidationRequest:
    """The server's request that a client evaluates an adapter on the validation rows of a subset."""

    client: str
    cluster: int
    adapter: AdapterState


@dataclass(frozen=True, slots=True)
class ValidationReply:
    """The client's reply with its mean validation loss."""

    client: str
    cluster: int
    loss: float  # nats per completion token
    num_tokens: int  # completion tokens, the weight of the loss; 0 without validation rows


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """The base model of a bundle's adapters."""

    model: str  # a hub id, a path, or builtin:tiny
    revision: str | None
    fingerprint: str  # hash of its config and tokenizer


@dataclass(frozen=True, slots=True)
class EmbedderSpec:
    """The embedder of a bundle's centroids."""

    kind: str  # hidden states of the "base" or an "encoder"; "sentence-transformers"; "endpoint"
    model: str  # the base's name, a hub id or a path; an endpoint's name for its model
    layer: int  # of the hidden states; 0 is the token embedding, and the value for endpoints
    max_tokens: int
    dtype: str  # of the forward pass; vectors are float32
    dim: int
    fingerprint: str
    pooling: str = "unit"  # mean over tokens of the states scaled to "unit" length, or unscaled: "mean"

    @property
    def digest(self) -> str:
        """First digits of a SHA-256 over what makes vectors comparable."""
        parts = (self.kind, self.layer, self.max_tokens, self.dim, self.fingerprint, self.pooling)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class TaskCluster:
    """One task cluster of a bundle and the adapter that answers for it."""

    name: str  # a task label if the clients' rows have labels, else "task-0" …
    adapter: str  # name and content hash: "headline-1f2e3d4c"
    num_examples: int
    clients: tuple[str, ...]
    task_counts: Mapping[str, int]  # training rows by task label; empty without labels
    radius: float  # distance beyond which a prompt falls back
    training: Mapping[str, float] = field(default_factory=dict)  # "loss", "steps", "examples"

    @property
    def task(self) -> str:
        """The most common task label of its rows; "" without labels."""
        return max(self.task_counts, key=lambda task: (self.task_counts[task], task), default="")


@dataclass(frozen=True, slots=True)
class Guarantee:
    """(ε, δ)-differential privacy against an observer of all messages of a client (docs/privacy.md)."""

    unit: str  # what is protected: one "row", or all rows of a "client"
    covers: str  # the messages that the guarantee applies to
    num_releases: int
    epsilon: float
    delta: float

    def __str__(self) -> str:
        unit = "a row" if self.unit == "row" else "all rows of a client"
        return f"ε = {self.epsilon:.3g}, δ = {self.delta:g} for {unit}: {self.covers}"


@dataclass(frozen=True, slots=True)
class Decision:
    """The model that answers a prompt, and why."""

    model: str  # vLLM's model name: an adapter or "base"; "reject" if the prompt is rejected
    cluster: str  # the nearest task cluster's name
    distance: float  # to the nearest centroid
    radius: float  # of the nearest task cluster
    margin: float  # distance to the second nearest task cluster minus ``distance``
    fallback: bool  # the prompt lies beyond the radius
    distances: Mapping[str, float]  # by task cluster name
    turn: int = 0  # number of the deciding turn among the conversation's user turns with text, from 0


@dataclass(frozen=True, slots=True)
class Probe:
    """A conversation and its expected task cluster."""

    turns: tuple[str, ...]  # texts of the user turns
    cluster: str | None  # a task cluster's name; None: the fallback
    where: str = field(default="", compare=False)  # its line in the file


@dataclass(frozen=True, slots=True)
class OtherDecision:
    """Another bundle's decision for the same prompt."""

    bundle: str
    adapter: str
    cluster: str
    fallback: bool
    difference: str  # see ``decide.difference``


@dataclass(frozen=True, slots=True)
class LoggedDecision:
    """One line of the decision log: the decision for one prompt of a request."""

    time: float  # seconds since 1970
    id: str  # of the request; the response header ``x-fedrouter-id``
    prompt: int  # number of the prompt in the request, from 0
    bundle: str  # first digits of the SHA-256 of the bundle's manifest
    caller: str | None  # the client, if the request names it or its API key identifies it
    adapter: str
    cluster: str
    distance: float | None  # null: no text was embedded
    radius: float
    margin: float | None  # null: there is no second task cluster
    fallback: bool
    reason: str  # of the fallback: "radius", "no_text" or "overload"; "" without fallback
    turn: int  # number of the deciding user turn
    turns: int  # number of user turns with text
    routing_ms: float
    other: OtherDecision | None = None
    texts: tuple[str, ...] | None = None  # of the turns that may decide, the latest first; only if requested
    embedder: str | None = None  # ``EmbedderSpec.digest`` of the vectors' embedder
    vectors: tuple[str | None, ...] | None = None  # of these turns, base64 of float16; null: not embedded
