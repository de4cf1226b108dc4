"""Typed, validated settings. Unknown keys are errors; every setting is documented beneath it."""

import datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedrouter.errors import ConfigError

EMBEDDER_KEY = "FEDROUTER_EMBEDDER_KEY"  # environment variable with an embeddings endpoint's API key, if any

MAX_RANK = 512  # of an adapter that vLLM serves

Count = Literal["auto"] | Annotated[int, Field(ge=1)]
"""A number of clusters, given or found."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class BaseSettings(_Section):
    """The base model that all adapters share."""

    model: str = "builtin:tiny"
    """``builtin:tiny``, a local directory, or a Hugging Face hub id."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the frozen weights; auto: float32 on a CPU, bfloat16 on a GPU."""
    device: Literal["auto", "cpu", "cuda", "spread"] = "auto"
    """Where to train; auto: a GPU when there is one; spread: a base too large for one, over all GPUs."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4: train on a base of 4-bit weights (QLoRA, bitsandbytes); prompts are embedded before, without."""
    chat_template: str | None = None
    """Instead of the base's own: ``alpaca`` or a Jinja file; either travels in the bundle."""
    date: datetime.date = datetime.date(2024, 7, 26)
    """What a chat template writes that asks for the date, in training and serving alike."""


class DataSettings(_Section):
    """The clients' private data."""

    source: str | list[str] = "builtin:four-tasks"
    """One data set to partition: ``builtin:four-tasks``, files, directories, a hub id …"""
    split: str = "train"
    """Which split of a Hugging Face data set or of the built-in one."""
    clients: dict[str, str] = Field(default_factory=dict)
    """Instead of ``source``: one file (or data set) per client, by the client's name."""
    partition: Literal["single", "dual", "all", "iid", "dirichlet"] = "dual"
    """How ``source`` is dealt out: one task a client, two, every task, blind, or Dirichlet over tasks."""
    num_clients: int = Field(8, ge=1)
    alpha: float = Field(0.5, gt=0)
    """Concentration of ``dirichlet``; smaller is more uneven."""
    num_per_task: int = Field(600, ge=2)
    """Rows a task of the built-in data set."""
    max_per_client: int | None = Field(None, ge=2)
    """Cap on a client's rows."""
    fields: dict[str, str] = Field(default_factory=dict)
    """Other names of fields: ``prompt = "question"``, ``completion = "answer"``, ``task = "category"``."""
    ignore: list[str] = Field(default_factory=list)
    """Fields that are left out on purpose: nothing is said of them."""

    @model_validator(mode="after")
    def _one_origin(self) -> "DataSettings":
        given = self.model_fields_set
        clash = given & {"source", "partition", "num_clients", "alpha", "num_per_task"}
        if self.clients and clash:
            raise ValueError(f"data.clients gives each client its own file; remove data.{sorted(clash)[0]}")
        return self


class EmbedderSettings(_Section):
    """The vectors that clustering and routing see."""

    kind: Literal["auto", "base", "encoder", "sentence-transformers", "endpoint"] = "auto"
    """``base``: hidden states of the base model; ``encoder``: of another; or a sentence embedder's output,
    loaded here or asked of an ``endpoint``. ``auto``: the base where that costs little, else MiniLM."""
    model: str | None = None
    """The other model: a local directory or a hub id; or what the endpoint calls it."""
    url: str | None = None
    """Of kind ``endpoint``: a server with OpenAI's ``/v1/embeddings``. Its key: FEDROUTER_EMBEDDER_KEY."""
    layer: Literal["middle", "last"] | Annotated[int, Field(ge=0)] = "middle"
    """Whose hidden states; ``last`` is the paper's. The middle knows a prompt's form as well as its topic."""
    pooling: Literal["unit", "mean"] = "unit"
    """Each token's state at unit length, then the mean; ``mean``: as it is (paper). In pretrained decoders
    the first token's state is a hundred times as long as all others and would be all that is seen."""
    max_tokens: int = Field(512, ge=8)
    """Longer prompts are cut, in training and serving alike."""
    cache: str | None = None
    """Directory that keeps clients' embeddings, for several runs; without it ``embeddings/`` in the run."""

    @model_validator(mode="after")
    def _model_fits(self) -> "EmbedderSettings":
        if (self.kind in ("auto", "base")) != (self.model is None):
            raise ValueError("embedder.model belongs to every kind but auto and base, and they need it")
        if (self.kind == "endpoint") != (self.url is not None):
            raise ValueError("embedder.url belongs to kind endpoint, and that needs it")
        if self.url is not None:
            checked_url(self.url)
        if self.kind in ("auto", "sentence-transformers", "endpoint"):
            for name in sorted({"layer", "pooling"} & self.model_fields_set):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"embedder.{name} belongs to kinds base and encoder; remove it")
        return self


class ClusterSettings(_Section):
    """Local clustering on the clients, global clustering on the server."""

    method: Literal["tree", "kmeans"] = "tree"
    """``tree``: join fine local clusters until tasks stand apart; ``kmeans``: twice k-means (paper)."""
    local: Count = "auto"
    """Local clusters a client; "auto" cuts finer than tasks."""
    global_: Count = Field("auto", alias="global")
    """Task clusters, or found from what the clients reveal; method ``clustered``: groups of clients."""
    every: int | None = Field(None, ge=1)
    """Cluster anew after so many rounds, with the rows that the files of ``data.clients`` hold then."""
    warmup: int = Field(1, ge=1)
    """Of method ``clustered``: rounds of FedAvg before clients are grouped."""

    @model_validator(mode="after")
    def _numbers_fit(self) -> "ClusterSettings":
        if self.method == "kmeans" and "auto" in (self.local, self.global_):
            raise ValueError("cluster.method kmeans needs numbers for cluster.local and cluster.global")
        return self


class LoraSettings(_Section):
    """The adapters."""

    rank: int = Field(8, ge=1)
    """Of every task cluster's adapter."""
    ranks: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Lower ranks of clients that cannot train the full one, by the client's name."""
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    freeze_a: bool = False
    """Train B alone and keep A as it was drawn (FFA-LoRA): averaging is then exact."""

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
    steps: int | None = Field(20, ge=1)
    """Optimizer steps a client and round, shared over its subsets by size."""
    epochs: int | None = Field(None, ge=1)
    """Instead of ``steps``: how often a client goes over each subset in a round."""
    schedule: Literal["all", "one"] = "all"
    """A client trains all of its subsets in every round, or one in turn (the paper's reference code)."""
    participation: float = Field(1.0, gt=0, le=1)
    """Share of the clients that is asked in a round, drawn anew in each; at least one."""
    validation: float = Field(0.0, ge=0, le=0.5)
    """Share of each subset's rows not trained on; with it the bundle gets each adapter's best round."""
    patience: int | None = Field(None, ge=1)
    """Stop after so many rounds in which no task cluster's validation loss fell."""
    batch_size: int = Field(8, ge=1)
    """Rows in memory at a time; an optimizer step takes ``gradient_accumulation`` times as many."""
    gradient_accumulation: int = Field(1, ge=1)
    """Batches an optimizer step: the same step as with one batch so many times as large."""
    learning_rate: float = Field(5e-4, gt=0)
    learning_rate_end: float = Field(1e-5, ge=0)
    """Cosine from ``learning_rate`` to this over the rounds (paper section 4)."""
    weight_decay: float = Field(0.0, ge=0)
    proximal: float = Field(0.0, ge=0)
    """FedProx's μ: pulls a client's adapter back to the one it was sent; 0.01 to 1 are common."""
    max_length: int = Field(512, ge=16)
    """Tokens of a row: the answer comes first, a longer prompt loses its beginning."""
    loss: Literal["answers", "last"] = "answers"
    """What of a conversation is learned: every answer of the assistant, or the last one alone."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, slower, the same adapters."""
    stacked: bool = False
    """Train all adapters of a round in one batch: many times as quick where the base is small for its GPU."""
    keep_checkpoints: int = Field(2, ge=1)
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default_factory=list)
    """Trackers that get every round's metrics, beside metrics.jsonl."""

    @property
    def step_size(self) -> int:
        """Rows an optimizer step."""
        return self.batch_size * self.gradient_accumulation

    @model_validator(mode="before")
    @classmethod
    def _epochs_in_place_of_steps(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("epochs") is not None and "steps" not in values:
            return {**values, "steps": None}
        return values

    @model_validator(mode="after")
    def _options_fit(self) -> "TrainSettings":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give train.steps or train.epochs, one of them")
        if self.stacked and self.gradient_checkpointing:
            raise ValueError("train.stacked keeps activations; remove train.gradient_checkpointing")
        if self.patience is not None and not self.validation:
            raise ValueError("train.patience needs rows to judge by: set train.validation, 0.1 say")
        return self


class AggregateSettings(_Section):
    """What the server makes of one round's updates of a task cluster."""

    method: Literal["average", "exact"] = "average"
    """Mean of A and mean of B (paper), or the mean of the products BA cut back to the rank."""
    robust: Literal["none", "median", "trimmed"] = "none"
    """Instead of a mean, for each weight: median, or mean without the extremes. Each client counts alike."""
    trim: float = Field(0.2, gt=0, lt=0.5)
    """Share of clients that ``trimmed`` leaves out at each end, at least one."""
    clip: float | None = Field(None, gt=0)
    """Shorten longer updates to this L2 norm, over all weights of an adapter; metrics show norms."""
    outlier: float = Field(10.0, gt=1)
    """Refuse updates so many times as long as their round's median, a step; among four clients or more."""
    server: Literal["none", "momentum", "adam"] = "none"
    """Server optimizer over the rounds: FedAvgM or FedAdam."""
    server_learning_rate: float | None = Field(None, gt=0)
    """Of the server optimizer; without: 1 for momentum, 0.001 for adam."""

    @model_validator(mode="after")
    def _options_fit(self) -> "AggregateSettings":
        if self.method == "exact" and (self.robust != "none" or self.server != "none"):
            other = "robust" if self.robust != "none" else "server"
            raise ValueError(f"aggregate.{other} works on A and B apart; it needs aggregate.method average")
        if self.trim != 0.2 and self.robust != "trimmed":
            raise ValueError("aggregate.trim belongs to aggregate.robust trimmed; remove it")
        if self.server_learning_rate is not None and self.server == "none":
            raise ValueError("aggregate.server_learning_rate belongs to aggregate.server; remove it")
        return self


class PrivacySettings(_Section):
    """What a client lets out; docs/privacy.md lists it all."""

    min_cluster_size: int = Field(5, ge=1)
    """Nothing is revealed of fewer rows of a client together, and no adapter trained on them."""
    clip_embeddings: float | None = Field(None, gt=0)
    """With ``centroid_noise``: vectors are cut to this distance from those of three fixed texts, averaged."""
    centroid_noise: float = Field(0.0, ge=0)
    """Multiplier of the Gaussian noise on all that is revealed before the rounds; protects a row."""
    clip_updates: float | None = Field(None, gt=0)
    """A client cuts its updates to this L2 norm, over all weights of an adapter, before it sends them."""
    update_noise: float = Field(0.0, ge=0)
    """Multiplier of the Gaussian noise on each update; protects all that a client holds."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """The δ for which ε is reported; well below one over the number of rows."""

    @property
    def noisy(self) -> bool:
        """Whether anything is sent with noise."""
        return bool(self.centroid_noise or self.update_noise)

    @model_validator(mode="after")
    def _options_fit(self) -> "PrivacySettings":
        if (self.clip_embeddings is None) != (not self.centroid_noise):
            raise ValueError("privacy.clip_embeddings and privacy.centroid_noise need each other")
        if self.update_noise and self.clip_updates is None:
            raise ValueError(
                "privacy.update_noise needs privacy.clip_updates: noise hides bounded updates only"
            )
        if self.delta != 1e-5 and not self.noisy:
            raise ValueError("privacy.delta belongs to privacy.centroid_noise and update_noise; remove it")
        return self


class RoutingSettings(_Section):
    """What the bundle says about far prompts."""

    quantile: float = Field(0.97, gt=0.5, le=1)
    """A task cluster's radius holds this share of its prompts."""
    slack: float = Field(1.0, gt=0)
    """Widens every radius; above 1 where prompts to come differ more than rows do."""
    fallback: Literal["base", "nearest", "generalist", "reject"] = "base"
    """What answers beyond the radius: base model, nearest adapter, mean of all adapters, or nobody."""
    probes: str | None = None
    """A file of conversations and where each must go; the bundle carries it, and reloads ask it."""


class Config(_Section):
    """All settings of a run."""

    method: Literal["fedrouter", "fedavg", "fedprox", "local", "clustered", "feddpa", "oracle"] = "fedrouter"
    """The paper's method or a baseline under the same loop, data, steps and seeds; see docs/training.md."""
    seed: int = Field(0, ge=0)
    base: BaseSettings = Field(default_factory=BaseSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    embedder: EmbedderSettings = Field(default_factory=EmbedderSettings)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)
    lora: LoraSettings = Field(default_factory=LoraSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)
    aggregate: AggregateSettings = Field(default_factory=AggregateSettings)
    privacy: PrivacySettings = Field(default_factory=PrivacySettings)
    routing: RoutingSettings = Field(default_factory=RoutingSettings)

    @model_validator(mode="after")
    def _options_belong_to_the_method(self) -> "Config":
        method = self.method
        own = {"fedrouter": {"method", "local", "global_", "every"}, "clustered": {"global_", "warmup"}}.get(
            method, set()
        )
        for name, field in ClusterSettings.model_fields.items():
            if name not in own and getattr(self.cluster, name) != field.default:
                key = field.alias or name
                raise ValueError(
                    f"method {method} has no use for cluster.{key}; "
                    "remove it, or empty a file's section with --set cluster={}"
                )
        if self.cluster.every and not self.data.clients:
            raise ValueError("cluster.every reads clients' own files again: give them in data.clients")
        if self.cluster.every and self.base.quantization != "none" and self.embedder.kind in ("auto", "base"):
            raise ValueError(
                "cluster.every embeds between rounds, which a base with base.quantization cannot; "
                "set embedder.kind and embedder.model"
            )
        if method == "local" and self.aggregate != AggregateSettings():
            raise ValueError("method local averages nothing; remove [aggregate]")
        if method == "fedprox" and not self.train.proximal:
            raise ValueError("method fedprox needs train.proximal above 0; 0.01 to 1 are common")
        if method in ("fedavg", "local") and self.train.proximal:
            raise ValueError(
                f"method {method} has no use for train.proximal; FedAvg with it is method fedprox"
            )
        if method not in ("fedrouter", "oracle", "feddpa") and self.train.schedule == "one":
            raise ValueError(f"method {method} gives a client one subset; leave train.schedule at all")
        if method == "clustered" and (
            self.train.participation < 1 or self.cluster.warmup >= self.train.rounds
        ):
            raise ValueError(
                "method clustered needs every client in its warm-up, and rounds after it: "
                "remove train.participation, raise train.rounds"
            )
        if self.privacy.centroid_noise and (method, self.cluster.method) != ("fedrouter", "kmeans"):
            raise ValueError(
                "privacy.centroid_noise covers method fedrouter with cluster.method kmeans; "
                "other ways reveal matrices that it would drown"
            )
        if self.privacy.update_noise and self.train.validation:
            raise ValueError("privacy.update_noise does not cover validation losses; remove train.validation")
        if self.privacy.noisy and self.cluster.every:
            raise ValueError("privacy's noise is accounted for one clustering; remove cluster.every")
        if method == "feddpa" and 2 * self.lora.rank > MAX_RANK:
            raise ValueError(
                f"method feddpa mixes adapters to twice lora.rank, and vLLM serves rank {MAX_RANK} at most"
            )
        if self.train.stacked and (self.lora.ranks or self.lora.freeze_a or self.base.quantization != "none"):
            raise ValueError(
                "train.stacked trains whole adapters of one rank on an unquantised base; remove it, or "
                "lora.ranks, lora.freeze_a and base.quantization"
            )
        if self.lora.ranks and self.aggregate.robust != "none":
            raise ValueError("aggregate.robust compares adapters of one rank; remove it or lora.ranks")
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
        If it is none, or holds a secret: it is written into the run and shown in messages.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"the embedder's address is none: {error}") from error
    if parts.username or parts.password or parts.query:
        raise ConfigError(
            f"the embedder's address holds a password or a key; put that into the variable {EMBEDDER_KEY}"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"the embedder's address {url}: expected http://HOST:PORT")
    return url.rstrip("/").removesuffix("/v1")
