"""The carriers that cross boundaries: frozen dataclasses, no torch, no I/O.

Reading order is the order in which data flows: records → what a client reveals → what a
round exchanges → what a bundle holds → what a route decides.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Float64s = NDArray[np.float64]
AdapterState = Mapping[str, Array]
"""LoRA tensors by PEFT's names (``base_model.model…lora_A.weight``), float32."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation; ``content`` is text only."""

    role: str  # "system" | "user" | "assistant" | "tool"
    content: str
    more: Mapping[str, Any] = field(default_factory=dict)  # what else chat templates read: tool_calls, name …
    learned: bool = True  # of an assistant turn: it carries loss


@dataclass(frozen=True, slots=True)
class Record:
    """One training or test example."""

    turns: tuple[Turn, ...]  # the conversation before the answer; a user turn with text is among them
    completion: str  # the answer's text; of one that only calls tools, the calls as JSON
    task: str | None = None  # a label for names and scores; never used to cluster or to route
    answer: Turn | None = None  # where it is more than its text
    tools: tuple[Mapping[str, Any], ...] = ()  # JSON schemas, as chat templates take them
    where: str = field(default="", compare=False, repr=False)  # file and row

    @property
    def conversation(self) -> tuple[Turn, ...]:
        """All turns, the answer last."""
        return (*self.turns, self.answer or Turn("assistant", self.completion))


@dataclass(frozen=True, slots=True)
class LocalClusters:
    """What a client reveals of its rows in groups: its local clusters (paper: μ_{c,j}, n_{c,j})."""

    counts: Float64s  # (m,) rows in each
    centroids: Float64s  # (m, d) of embedded prompts; zeros where the count is 0
    scatter: Float64s  # (d, d), sum over rows of (x - centroid)(x - centroid)ᵀ, all groups together


@dataclass(frozen=True, slots=True)
class RoutingSpace:
    """Where distances are measured: z = (φ(x) - mean) @ transform, then nearest centroid."""

    mean: Array  # (d,)
    transform: Array  # (d, m)
    centroids: Array  # (n, m), in the transformed space
    cluster_of: tuple[int, ...]  # (n,), the task cluster of each centroid
    map: Array | None = None  # (m, 2): z @ map is where a picture shows z; older bundles have none

    @property
    def num_clusters(self) -> int:
        """How many task clusters the centroids belong to."""
        return max(self.cluster_of) + 1

    def project(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return embedded prompts (n, d) in the space's coordinates: (n, m), in the wider dtype of both."""
        return np.asarray((x - self.mean) @ self.transform)


@dataclass(frozen=True, slots=True)
class Member:
    """What a client says of itself when it is asked who is there."""

    client: str
    num_rows: int
    digest: (
        str  # changes with its rows; says nothing else of them, for it is made with a secret of the client
    )


@dataclass(frozen=True, slots=True)
class Reread:
    """What came of a client that was asked to read its rows again."""

    client: str
    problem: str | None  # why it goes on with the rows it had, in no word of them


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a client's rows lie among task clusters that already exist."""

    client: str
    within: Mapping[int, int]  # task cluster → rows within its radius, where they are enough to be revealed
    num_beyond: int  # rows beyond every radius; 0 where they are too few to be revealed
    may_summarise: bool  # the rows beyond are enough for a local cluster


@dataclass(frozen=True, slots=True)
class Membership:
    """Task clusters told instead of found, for the baselines: by client, or by task label."""

    clients: Mapping[str, tuple[int, ...]]  # all rows of a client: to each of these; prompts go to the first
    tasks: Mapping[str, int]  # all rows with a label
    num: int  # task clusters that prompts go to; any beyond are trained only


@dataclass(frozen=True, slots=True)
class Subset:
    """What a client reveals of its rows that belong to one task cluster (paper: D_{c,j})."""

    cluster: int  # the task cluster
    num_examples: int
    distances: Array  # (101,), to the nearest centroid, at quantiles 0 %, 1 % … 100 %
    task_counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Assignment:
    """A client's answer to the routing space: how its rows fall on the task clusters."""

    client: str
    subsets: tuple[Subset, ...]  # non-empty ones, by task cluster


@dataclass(frozen=True, slots=True)
class TrainRequest:
    """The server asks a client to train one task cluster's adapter on its subset, in one round."""

    client: str
    cluster: int  # the task cluster
    round: int  # from 0
    adapter: AdapterState
    steps: int
    learning_rate: float


@dataclass(frozen=True, slots=True)
class TrainReply:
    """The client answers with the trained adapter."""

    client: str
    cluster: int
    adapter: AdapterState
    num_examples: int  # examples really trained in this round: the weight; with noise, those asked for
    loss: float | None  # mean training loss over the steps, nats a token; with noise it stays with the client
    seconds: float  # with noise 0


@dataclass(frozen=True, slots=True)
class TrainFailure:
    """The client could not do it; it costs this round, not the run."""

    client: str
    cluster: int
    reason: str  # one line, in no word of the rows


@dataclass(frozen=True, slots=True)
class ValidationRequest:
    """The server asks a client how well an adapter does on the rows of a subset that are not trained on."""

    client: str
    cluster: int
    adapter: AdapterState


@dataclass(frozen=True, slots=True)
class ValidationReply:
    """The client answers with a mean."""

    client: str
    cluster: int
    loss: float  # nats a completion token
    num_tokens: int  # completion tokens behind it: the weight; 0 where no row was held back


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """The base model that a bundle's adapters belong to."""

    model: str  # a hub id, a path, or builtin:tiny
    revision: str | None
    fingerprint: str  # of its config and tokenizer


@dataclass(frozen=True, slots=True)
class EmbedderSpec:
    """The embedder that a bundle's centroids belong to."""

    kind: str  # hidden states of the "base" or an "encoder"; "sentence-transformers"; "endpoint"
    model: str  # the base's name, a hub id or a path; for an endpoint what it calls the model
    layer: int  # whose hidden states are averaged over tokens; 0 is the token embedding, or no layer of ours
    max_tokens: int
    dtype: str  # of the forward pass; vectors are float32
    dim: int
    fingerprint: str
    pooling: str = "unit"  # mean of tokens' states at "unit" length, or as they are: "mean"


@dataclass(frozen=True, slots=True)
class TaskCluster:
    """One task cluster of a bundle and the adapter that answers for it."""

    name: str  # "headline" when the clients label their tasks, else "task-0" …
    adapter: str  # name and content hash: "headline-1f2e3d4c"
    num_examples: int
    clients: tuple[str, ...]
    task_counts: Mapping[str, int]  # training rows by task label; empty without labels
    radius: float  # distance beyond which a prompt is out of distribution
    training: Mapping[str, float] = field(default_factory=dict)  # "loss", "steps", "examples"

    @property
    def task(self) -> str:
        """The commonest task label of its rows; "" without labels."""
        return max(self.task_counts, key=lambda task: (self.task_counts[task], task), default="")


@dataclass(frozen=True, slots=True)
class Guarantee:
    """(ε, δ)-differential privacy towards whoever sees all messages of a client (docs/privacy.md)."""

    unit: str  # what may be replaced by anything else: "row", or "client": all of its rows
    covers: str  # which messages
    num_releases: int
    epsilon: float
    delta: float

    def __str__(self) -> str:
        what = "a row" if self.unit == "row" else "all rows of a client"
        return f"ε = {self.epsilon:.3g}, δ = {self.delta:g} for {what}: {self.covers}"


@dataclass(frozen=True, slots=True)
class Decision:
    """Where one prompt goes, and why."""

    model: str  # the name to ask vLLM for: an adapter, or "base"; "reject" when nobody is to answer
    cluster: str  # the nearest task cluster's name
    distance: float  # to the nearest centroid; smaller is closer
    radius: float  # of the nearest task cluster
    margin: float  # distance to the second nearest task cluster minus ``distance``
    fallback: bool  # the prompt lies beyond the radius
    distances: Mapping[str, float]  # by task cluster name
    turn: int = 0  # of a conversation's user turns with text, the number of the one that decides


@dataclass(frozen=True, slots=True)
class Probe:
    """A conversation, and where it must go."""

    turns: tuple[str, ...]  # texts of the user turns
    cluster: str | None  # a task cluster's name; None: the fallback
    where: str = field(default="", compare=False)  # the line


@dataclass(frozen=True, slots=True)
class OtherDecision:
    """What another bundle decided for the same prompt."""

    bundle: str
    adapter: str
    cluster: str
    fallback: bool
    difference: str  # see ``decide.difference``


@dataclass(frozen=True, slots=True)
class LoggedDecision:
    """One line of the decision log: a prompt of a request, without its text unless that is asked for."""

    time: float  # seconds since 1970
    id: str  # of the request, as in the answer's ``x-fedrouter-id``
    prompt: int  # which of the request's prompts, from 0
    bundle: str  # of whose manifest the SHA-256 begins so
    caller: str | None  # the client, where one is named or known
    adapter: str
    cluster: str
    distance: float | None  # null: no text was embedded
    radius: float
    margin: float | None  # null: there is no second task cluster
    fallback: bool
    reason: str  # of the fallback: "radius", "no_text" or "overload"; empty without
    turn: int  # the user turn that decided
    turns: int  # user turns with text
    routing_ms: float
    other: OtherDecision | None = None
    texts: tuple[str, ...] | None = None  # of the turns that may decide, the last one first
    vectors: tuple[str | None, ...] | None = None  # theirs, base64 of float16; null: not embedded
