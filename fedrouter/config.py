"""Typed, validated settings; unknown keys are errors.

The string beneath a setting documents it: what it sets, then its values and the meaning of its default.
"""

import datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedrouter.errors import ConfigError
from fedrouter.types import A_NAME, is_label

EMBEDDER_KEY = "FEDROUTER_EMBEDDER_KEY"  # environment variable with the embeddings endpoint's API key

MAX_RANK = 512  # vLLM's limit for the rank of an adapter

Count = Literal["auto"] | Annotated[int, Field(ge=1)]
"""A number of clusters; ``auto``: found from the data."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class BaseSettings(_Section):
    """The base model that all adapters share."""

    model: str = "builtin:tiny"
    """``builtin:tiny``, a local directory, or a Hugging Face hub id."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the frozen weights; ``auto``: float32 on a CPU, bfloat16 on a GPU."""
    device: Literal["auto", "cpu", "cuda", "spread"] = "auto"
    """Device to train on; ``auto``: a GPU if there is one; ``spread``: the base is split over all GPUs."""
    quantization: Literal["none", "nf4"] = "none"
    """``nf4``: train on 4-bit base weights (QLoRA, bitsandbytes). Prompts are embedded with the
    unquantised base before training."""
    chat_template: str | None = None
    """Replacement for the base's chat template, stored in the bundle: ``alpaca`` or a Jinja file."""
    date: datetime.date = datetime.date(2024, 7, 26)
    """The date given to chat templates that ask for today's date, in training and in serving."""


class DataSettings(_Section):
    """The clients' private data."""

    source: str | list[str] = "builtin:four-tasks"
    """One data set to partition: ``builtin:four-tasks``, files, directories, a hub id …"""
    split: str = "train"
    """Split of a data set that has splits; other data has only ``train``."""
    clients: dict[str, str] = Field(default_factory=dict)
    """Data source of each client by the client's name; replaces ``source``."""
    partition: Literal["single", "dual", "all", "iid", "dirichlet"] = "dual"
    """How ``source`` is partitioned: one task per client (``single``), two (``dual``) or all tasks;
    ``iid``: regardless of tasks; ``dirichlet``: in Dirichlet proportions of each task."""
    num_clients: int = Field(8, ge=1)
    """Number of clients that ``source`` is partitioned into."""
    alpha: float = Field(0.5, gt=0)
    """Concentration of ``dirichlet``; smaller is more uneven."""
    num_per_task: int = Field(600, ge=2)
    """Rows per task of the built-in data set."""
    max_per_client: int | None = Field(None, ge=2)
    """Maximum number of rows per client; unset: no limit."""
    fields: dict[str, str] = Field(default_factory=dict)
    """Names of fields in the data: ``prompt = "question"``, ``completion = "answer"``, ``task = "topic"``."""
    ignore: list[str] = Field(default_factory=list)
    """Fields to skip without a warning."""

    @field_validator("source", mode="before")
    @classmethod
    def _names_data(cls, source: Any) -> Any:
        names = source if isinstance(source, list) else [source]
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise ValueError(f"data.source: expected a data set, or a list of data sets, found {source!r}")
        return source

    @model_validator(mode="after")
    def _clients_have_names_and_data(self) -> "DataSettings":
        for name, source in self.clients.items():
            if not is_label(name):
                raise ValueError(f"data.clients: {name!r}: {A_NAME}")
            if not source.strip():
                raise ValueError(f"data.clients.{name} is empty; give the client a data set")
        return self

    @model_validator(mode="after")
    def _one_origin(self) -> "DataSettings":
        given = self.model_fields_set
        clash = given & {"source", "partition", "num_clients", "alpha", "num_per_task"}
        if self.clients and clash:
            raise ValueError(f"data.clients gives each client its own data; remove data.{sorted(clash)[0]}")
        return self


class EmbedderSettings(_Section):
    """The embedder, whose vectors are used for clustering and routing."""

    kind: Literal["auto", "base", "encoder", "sentence-transformers", "endpoint"] = "auto"
    """``base``: hidden states of the base model; ``encoder``: hidden states of another model;
    ``sentence-transformers``: a sentence embedder; ``endpoint``: an embeddings API.
    ``auto``: the base if it is small, else MiniLM."""
    model: str | None = None
    """Model of the embedder: a local directory, a hub id, or the endpoint's name for it."""
    url: str | None = None
    """Address of a server with OpenAI's ``/v1/embeddings``, for kind ``endpoint``. Its API key is read from
    the environment variable FEDROUTER_EMBEDDER_KEY."""
    layer: Literal["middle", "last"] | Annotated[int, Field(ge=0)] = "middle"
    """Layer of the hidden states; ``last`` is the paper's. The middle layer encodes a prompt's form as well
    as its topic."""
    pooling: Literal["unit", "mean"] = "unit"
    """How tokens' hidden states are averaged; ``unit``: each scaled to unit length first; ``mean``: unscaled
    (paper). In pretrained decoders the first token's state is a hundred times as long as the others and
    would dominate the mean."""
    max_tokens: int = Field(512, ge=8)
    """Number of tokens to which prompts are truncated, in training and in serving."""
    cache: str | None = None
    """Directory where clients' embeddings are cached across runs; unset: ``embeddings/`` in the run."""

    @model_validator(mode="after")
    def _model_fits(self) -> "EmbedderSettings":
        if (self.kind in ("auto", "base")) != (self.model is None):
            raise ValueError(
                "embedder.model is needed for all embedder.kind but auto and base, and not allowed for these"
            )
        if (self.kind == "endpoint") != (self.url is not None):
            raise ValueError("embedder.url is needed for embedder.kind endpoint, and not allowed for others")
        if self.url is not None:
            checked_url(self.url)
        if self.kind in ("auto", "sentence-transformers", "endpoint"):
            for name in sorted({"layer", "pooling"} & self.model_fields_set):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"embedder.{name} is only for kinds base and encoder; remove it")
        return self


class ClusterSettings(_Section):
    """Local clustering on the clients, global clustering on the server."""

    method: Literal["tree", "kmeans"] = "tree"
    """``tree``: merge fine local clusters until the tasks are separate; ``kmeans``: k-means on the clients
    and again on the server (paper)."""
    local: Count = "auto"
    """Number of local clusters per client; ``auto``: more than it has tasks."""
    global_: Count = Field("auto", alias="global")
    """Number of task clusters, or of client groups with method ``clustered``; ``auto``: found from what the
    clients reveal."""
    every: int | None = Field(None, ge=1)
    """Number of rounds after which clusters are computed again, from the current rows in the files of
    ``data.clients``; unset: never."""
    warmup: int = Field(1, ge=1)
    """Rounds of FedAvg before clients are grouped, for method ``clustered``."""

    @model_validator(mode="after")
    def _numbers_fit(self) -> "ClusterSettings":
        if self.method == "kmeans" and "auto" in (self.local, self.global_):
            raise ValueError("cluster.method kmeans needs numbers for cluster.local and cluster.global")
        return self


class LoraSettings(_Section):
    """The adapters."""

    rank: int = Field(8, ge=1)
    """Rank of every adapter."""
    ranks: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Lower ranks for clients that cannot train the full rank, by the client's name."""
    alpha: int = Field(16, ge=1)
    """LoRA's scale: the product BA is multiplied by alpha ÷ rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability of the adapters' inputs in training."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the modules that get adapters; ``all-linear``: all linear layers but the output layer."""
    freeze_a: bool = False
    """Train only B and keep A at its random initial value (FFA-LoRA): averaging is then exact."""

    @model_validator(mode="after")
    def _can_be_served(self) -> "LoraSettings":
        if self.rank > MAX_RANK:
            raise ValueError(f"lora.rank {self.rank}: vLLM serves adapters of rank {MAX_RANK} at most")
        return self

    @model_validator(mode="after")
    def _ranks_fit(self) -> "LoraSettings":
        for client, rank in self.ranks.items():
            if rank > self.rank:
                raise ValueError(
                    f"lora.ranks: client {client} has {rank}, above lora.rank {self.rank}; raise that"
                )
        return self


class TrainSettings(_Section):
    """The rounds."""

    rounds: int = Field(10, ge=1)
    """Number of rounds."""
    steps: int | None = Field(20, ge=1)
    """Optimizer steps per client and round, divided among its subsets by size."""
    epochs: int | None = Field(None, ge=1)
    """Passes over each of a client's subsets per round; replaces ``steps``."""
    schedule: Literal["turns", "all"] = "turns"
    """How a client divides its steps: ``turns``: all steps of a round to one subset, in turn, as in the
    paper's code, more often to larger subsets; ``all``: to all subsets in every round, as ``epochs`` does."""
    participation: float = Field(1.0, gt=0, le=1)
    """Share of the clients that takes part in a round, drawn again for each round; at least one client."""
    validation: float = Field(0.0, ge=0, le=0.5)
    """Share of each subset's rows held out for validation; above 0 the bundle gets each adapter from its best
    round."""
    patience: int | None = Field(None, ge=1)
    """Number of rounds without a lower validation loss in any task cluster after which training stops; unset:
    all rounds are run."""
    batch_size: int = Field(8, ge=1)
    """Rows in memory at a time."""
    gradient_accumulation: int = Field(1, ge=1)
    """Batches per optimizer step, which is the same step as with one batch of all their rows."""
    learning_rate: float = Field(5e-4, gt=0)
    """Learning rate of the first round."""
    learning_rate_end: float = Field(1e-5, ge=0)
    """End of the learning rate's cosine decay over the rounds (paper section 4)."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of the clients' optimizer."""
    proximal: float = Field(0.0, ge=0)
    """FedProx's μ, which pulls a client's adapter towards the one it received; 0.01 to 1 are common."""
    max_length: int = Field(512, ge=16)
    """Maximum number of tokens per row; prompts are truncated at their beginning before answers are."""
    loss: Literal["answers", "last"] = "answers"
    """Turns of a conversation that carry loss: all of the assistant's, or only the last one."""
    gradient_checkpointing: bool = False
    """Recompute activations instead of storing them: less memory, slower, the same adapters."""
    stacked: bool = False
    """Train all adapters of a round in one batch: many times faster if the base is small for its GPU."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of newest checkpoints to keep."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default_factory=list)
    """Trackers that get every round's metrics, in addition to metrics.jsonl."""

    @property
    def step_size(self) -> int:
        """Rows per optimizer step."""
        return self.batch_size * self.gradient_accumulation

    @property
    def takes_turns(self) -> bool:
        """Whether a client with several subsets trains only some of them in a round."""
        return self.schedule == "turns" and self.epochs is None

    @property
    def num_steps(self) -> int:
        """Steps per client and round; with ``epochs`` they depend on the rows."""
        assert self.steps is not None, "train.epochs is set"
        return self.steps

    @model_validator(mode="before")
    @classmethod
    def _epochs_in_place_of_steps(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("epochs") is not None and "steps" not in values:
            return {**values, "steps": None}
        return values

    @model_validator(mode="after")
    def _options_fit(self) -> "TrainSettings":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either train.steps or train.epochs")
        if self.stacked and self.gradient_checkpointing:
            raise ValueError("train.stacked stores activations; remove train.gradient_checkpointing")
        if self.patience is not None and not self.validation:
            raise ValueError("train.patience needs validation rows: set train.validation, to 0.1 for example")
        return self


class AggregateSettings(_Section):
    """How the server aggregates the updates of a task cluster's adapter in a round."""

    method: Literal["average", "exact"] = "average"
    """``average``: mean of A and mean of B (paper); ``exact``: mean of the products BA, cut to the rank."""
    robust: Literal["none", "median", "trimmed"] = "none"
    """Replacement for the mean of each weight: ``median``, or ``trimmed``: mean without the extremes. All
    clients have the same weight."""
    trim: float = Field(0.2, gt=0, lt=0.5)
    """Share of clients that ``trimmed`` leaves out at each end; at least one client."""
    clip: float | None = Field(None, gt=0)
    """L2 norm over all weights of an adapter to which the server clips updates; unset: no clipping. The
    metrics show the norms."""
    outlier: float = Field(10.0, gt=1)
    """Reject updates whose norm per step is more than this multiple of the median in their round; applies to
    four or more clients."""
    server: Literal["none", "momentum", "adam"] = "none"
    """Server optimizer over the rounds: ``momentum`` is FedAvgM, ``adam`` is FedAdam."""
    server_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the server optimizer; unset: 1 for ``momentum``, 0.001 for ``adam``."""

    @model_validator(mode="after")
    def _options_fit(self) -> "AggregateSettings":
        if self.method == "exact" and (self.robust != "none" or self.server != "none"):
            other = "robust" if self.robust != "none" else "server"
            raise ValueError(
                f"aggregate.{other} needs aggregate.method average: it works on A and B separately"
            )
        if self.trim != 0.2 and self.robust != "trimmed":
            raise ValueError("aggregate.trim is only for aggregate.robust trimmed; remove it")
        if self.server_learning_rate is not None and self.server == "none":
            raise ValueError("aggregate.server_learning_rate is only for aggregate.server; remove it")
        return self


class PrivacySettings(_Section):
    """What a client reveals; docs/privacy.md is the complete list."""

    min_cluster_size: int = Field(5, ge=1)
    """Minimum number of a client's rows that are revealed as a group or that an adapter is trained on."""
    clip_embeddings: float | None = Field(None, gt=0)
    """Distance from the mean embedding of three fixed texts to which embeddings are clipped, with
    ``centroid_noise``."""
    centroid_noise: float = Field(0.0, ge=0)
    """Multiplier of the Gaussian noise on everything revealed before the rounds; protects each row."""
    clip_updates: float | None = Field(None, gt=0)
    """L2 norm over all weights of an adapter to which a client clips its updates; unset: no clipping."""
    update_noise: float = Field(0.0, ge=0)
    """Multiplier of the Gaussian noise on each update; protects all rows of a client together."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """The δ for which ε is reported; should be far below 1 ÷ the number of rows."""

    @property
    def noisy(self) -> bool:
        """Whether noise is added to anything."""
        return bool(self.centroid_noise or self.update_noise)

    @model_validator(mode="after")
    def _options_fit(self) -> "PrivacySettings":
        if (self.clip_embeddings is None) != (not self.centroid_noise):
            raise ValueError("privacy.clip_embeddings and privacy.centroid_noise need each other")
        if self.update_noise and self.clip_updates is None:
            raise ValueError(
                "privacy.update_noise needs privacy.clip_updates: noise only hides updates of bounded norm"
            )
        if self.delta != 1e-5 and not self.noisy:
            raise ValueError(
                "privacy.delta is only for privacy.centroid_noise and privacy.update_noise; remove it"
            )
        return self


class RoutingSettings(_Section):
    """The radii of task clusters and the fallback beyond them."""

    quantile: float = Field(0.97, gt=0.5, le=1)
    """Share of a task cluster's prompts that lie within its radius."""
    slack: float = Field(1.0, gt=0)
    """Factor on every radius; above 1 if served prompts will vary more than the training rows."""
    fallback: Literal["base", "nearest", "generalist", "reject"] = "base"
    """What answers a prompt beyond the radius: ``base``: the base model; ``nearest``: the nearest task
    cluster's adapter; ``generalist``: the mean of all adapters; ``reject``: nothing."""
    probes: str | None = None
    """File of conversations with their expected task clusters; it is stored in the bundle and checked on
    every reload."""


class Config(_Section):
    """All settings of a run."""

    method: Literal["fedrouter", "fedavg", "fedprox", "local", "clustered", "feddpa", "oracle"] = "fedrouter"
    """The paper's method, or a baseline with the same loop, data, steps and seeds; see docs/training.md."""
    seed: int = Field(0, ge=0)
    """Seed of every random draw."""
    base: BaseSettings = Field(default_factory=BaseSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    embedder: EmbedderSettings = Field(default_factory=EmbedderSettings)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)
    lora: LoraSettings = Field(default_factory=LoraSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)
    aggregate: AggregateSettings = Field(default_factory=AggregateSettings)
    privacy: PrivacySettings = Field(default_factory=PrivacySettings)
    routing: RoutingSettings = Field(default_factory=RoutingSettings)

    @property
    def takes_turns(self) -> bool:
        """Whether a client may train only some of its subsets in a round."""
        return self.train.takes_turns and self.method in ("fedrouter", "oracle", "feddpa")

    @model_validator(mode="after")
    def _options_belong_to_the_method(self) -> "Config":
        method = self.method
        used = {"fedrouter": {"method", "local", "global_", "every"}, "clustered": {"global_", "warmup"}}.get(
            method, set()
        )
        for name, field in ClusterSettings.model_fields.items():
            if name not in used and getattr(self.cluster, name) != field.default:
                key = field.alias or name
                raise ValueError(
                    f"method {method} does not use cluster.{key}; "
                    "remove it, or clear the file's section with --set cluster={}"
                )
        if self.cluster.every and not self.data.clients:
            raise ValueError("cluster.every reads the clients' files again: list them in data.clients")
        if self.cluster.every and self.base.quantization != "none" and self.embedder.kind in ("auto", "base"):
            raise ValueError(
                "cluster.every embeds prompts between rounds, which a quantised base cannot do; "
                "remove base.quantization, or set embedder.kind and embedder.model"
            )
        if method == "local" and self.aggregate != AggregateSettings():
            raise ValueError("method local does not aggregate; remove [aggregate]")
        if method == "fedprox" and not self.train.proximal:
            raise ValueError("method fedprox needs train.proximal above 0; 0.01 to 1 are common")
        if method in ("fedavg", "local") and self.train.proximal:
            raise ValueError(f"method {method} does not use train.proximal; remove it, or use method fedprox")
        if method == "clustered" and (
            self.train.participation < 1 or self.cluster.warmup >= self.train.rounds
        ):
            raise ValueError(
                "method clustered needs every client in its warm-up rounds, and rounds after them: "
                "remove train.participation, and set train.rounds above cluster.warmup"
            )
        if self.privacy.centroid_noise and (method, self.cluster.method) != ("fedrouter", "kmeans"):
            raise ValueError(
                "privacy.centroid_noise is only for method fedrouter with cluster.method kmeans; "
                "the others reveal matrices that the noise would make useless"
            )
        if self.privacy.update_noise and self.train.validation:
            raise ValueError("privacy.update_noise does not cover validation losses; remove train.validation")
        if self.privacy.noisy and self.cluster.every:
            raise ValueError(
                "privacy.centroid_noise and privacy.update_noise are accounted for a single clustering; "
                "remove cluster.every"
            )
        if method == "feddpa" and 2 * self.lora.rank > MAX_RANK:
            raise ValueError(
                f"method feddpa merges adapters to twice lora.rank, and vLLM serves rank {MAX_RANK} at most; "
                "lower lora.rank"
            )
        if self.train.stacked and (self.lora.ranks or self.lora.freeze_a or self.base.quantization != "none"):
            raise ValueError(
                "train.stacked trains A and B of one rank on an unquantised base; remove it, or remove "
                "lora.ranks, lora.freeze_a and base.quantization"
            )
        if self.aggregate.robust != "none" and self.takes_turns:
            raise ValueError(
                "aggregate.robust compares the clients that train a task cluster in the same round; "
                'set train.schedule to "all", so that all of them do'
            )
        if self.lora.ranks and self.aggregate.robust != "none":
            raise ValueError("aggregate.robust needs adapters of one rank; remove it or lora.ranks")
        if method in ("fedavg", "fedprox", "local") and self.routing.fallback == "generalist":
            raise ValueError(
                f'method {method} has no generalist; set routing.fallback to "base" or "nearest"'
            )
        return self


def checked_url(url: str) -> str:
    """Return the address of an embeddings endpoint without a trailing ``/v1``.

    Raises
    ------
    ConfigError
        If it is not a URL, or contains a secret, which would be written into the run and into messages.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"the embedder's address is not a URL: {error}") from error
    if parts.username or parts.password or parts.query:
        raise ConfigError(
            "the embedder's address contains a password or a key; put it into the environment variable "
            f"{EMBEDDER_KEY} instead"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"the embedder's address {url}: expected http://HOST:PORT")
    return url.rstrip("/").removesuffix("/v1")
