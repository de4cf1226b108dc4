"""What the operator of a site has decided: where its rows and its base are, and what it takes part in."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from fedrouter.config import Config
from fedrouter.config_file import fitted, read_toml, validated
from fedrouter.errors import ConfigError
from fedrouter.train.lora import rank_of
from fedrouter.train.wire.messages import Assign, Hello, Regroup, SumTrain
from fedrouter.types import TrainRequest

Methods = ("fedrouter", "fedavg", "fedprox", "local", "clustered", "feddpa", "oracle")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Policy(_Section):
    """What this site does for a federation, and no more. What lies beyond is refused here, on the site."""

    methods: list[str] = Field(default=["fedrouter"])
    """Methods that it takes part in."""
    max_rank: int = Field(64, ge=1)
    """Largest rank of an adapter that it trains."""
    max_steps: int = Field(200, ge=1)
    """Most optimizer steps of one request."""
    min_cluster_size: int = Field(5, ge=1)
    """Fewest rows together that anything is told of; plans with a smaller number are refused."""
    centroid_noise: float = Field(0.0, ge=0)
    """Least noise multiplier on what is sent before the rounds."""
    update_noise: float = Field(0.0, ge=0)
    """Least noise multiplier on updates."""
    labels: bool = True
    """Whether task labels may be told; without, they are taken off the rows as these are read."""
    secure_sum: bool = False
    """Take part only where the server sees sums of updates, never one site's."""
    min_sum: int = Field(3, ge=2)
    """Fewest sites that it is summed with; itself counts."""
    max_requests_per_day: int = Field(10_000, ge=1)
    """Most messages that are answered in a day (UTC)."""
    max_mib_per_day: float = Field(10_000.0, gt=0)
    """Most that is sent in a day (UTC)."""


class SiteSettings(_Section):
    """``site.toml``."""

    name: str
    """As the federation's roster has it."""
    data: str
    """File or directory with the rows."""
    base: str | None = None
    """Where the base model is on this machine, if the server's name for it is not to be looked up."""
    server: str = "127.0.0.1:9092"
    """HOST:PORT of the federation's superlink."""
    ca: str = "ca.crt"
    """The federation's CA certificate."""
    split: str = "train"
    fields: dict[str, str] = Field(default_factory=dict)
    """Other names of fields, as in ``data.fields`` of a run."""
    ignore: list[str] = Field(default_factory=list)
    device: str = "auto"
    policy: Policy = Field(default_factory=Policy)


@dataclass(frozen=True, slots=True)
class Site:
    """One site's directory: settings, key, secret, audit."""

    directory: Path
    settings: SiteSettings

    @property
    def key(self) -> Path:
        """The private key, which never leaves the site."""
        return self.directory / "site.key"

    @property
    def secret(self) -> Path:
        """What noise and digests are made with; never leaves the site either."""
        return self.directory / "noise.key"

    @property
    def audit(self) -> Path:
        """One line a message."""
        return self.directory / "audit.jsonl"

    def place(self, path: str) -> str:
        """Return a path of ``site.toml`` as seen from its directory; other names stay as they are."""
        here = self.directory / Path(path).expanduser()
        return str(here.resolve()) if here.exists() else path


def load_site(directory: Path) -> Site:
    """Read a site's ``site.toml``.

    Raises
    ------
    ConfigError
        If it is missing or does not fit.
    """
    file = directory / "site.toml"
    missing = f"{file}: no such file; fedrouter client init {directory.name} makes it"
    return Site(directory, fitted(read_toml(file, missing=missing), SiteSettings, str(file)))


def plan_of(hello: Hello, site: Site) -> Config:
    """Return the server's settings as they are run here: with this site's rows, base and device.

    Raises
    ------
    ConfigError
        If they are none.
    """
    own = site.settings
    try:
        values: dict[str, Any] = json.loads(hello.settings)
        values = {k: v for k, v in values.items() if k != "data"}
        base = {**values.get("base", {}), "device": own.device}
        if own.base is not None:
            base |= {"model": site.place(own.base), "revision": None}
        data = {
            "clients": {own.name: site.place(own.data)},
            "split": own.split,
            "fields": own.fields,
            "ignore": own.ignore,
        }
        embedder = {**values.get("embedder", {}), "cache": None}
        train = {**values.get("train", {}), "report_to": []}
        routing = {**values.get("routing", {}), "probes": None}  # a file of the server's
        own_here = {"base": base, "data": data, "embedder": embedder, "train": train, "routing": routing}
        return validated({**values, **own_here})
    except (TypeError, ValueError) as error:
        raise ConfigError("the server's plan is none that this version knows") from error


def against_plan(policy: Policy, config: Config, secure: bool) -> str | None:
    """Return why a plan is refused; None: it is not."""
    privacy = config.privacy
    unmet: Mapping[str, bool] = {
        f"method {config.method}": config.method not in policy.methods,
        f"rank {config.lora.rank}": config.lora.rank > policy.max_rank,
        f"privacy.min_cluster_size {privacy.min_cluster_size}": privacy.min_cluster_size
        < policy.min_cluster_size,
        f"privacy.centroid_noise {privacy.centroid_noise}": privacy.centroid_noise < policy.centroid_noise,
        f"privacy.update_noise {privacy.update_noise}": privacy.update_noise < policy.update_noise,
        "method oracle, which asks for labels": config.method == "oracle" and not policy.labels,
        "updates that are not summed": policy.secure_sum and not secure,
        # Prompts would leave the site for it.
        "an embeddings endpoint": config.embedder.kind == "endpoint",
    }
    reasons = [what for what, broken in unmet.items() if broken]
    return f"its policy refuses {', '.join(reasons)}" if reasons else None


def against_request(policy: Policy, message: object) -> str | None:
    """Return why one request is refused; None: it is not."""
    if isinstance(message, SumTrain):
        return against_request(policy, message.request)
    if isinstance(message, TrainRequest):
        if message.steps > policy.max_steps:
            return f"its policy refuses {message.steps} steps; at most {policy.max_steps}"
        if rank_of(message.adapter) > policy.max_rank:
            return f"its policy refuses rank {rank_of(message.adapter)}; at most {policy.max_rank}"
    if isinstance(message, Assign | Regroup) and message.told and message.told.tasks and not policy.labels:
        return "its policy refuses to tell labels"
    return None
