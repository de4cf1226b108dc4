"""A site's settings, made by its operator: where its rows and base model are, and its policy."""

import difflib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fedrouter.config import Config
from fedrouter.config_file import fitted, read_toml, validated
from fedrouter.data import names_file
from fedrouter.errors import ConfigError, DataError
from fedrouter.layout import number_of
from fedrouter.train.lora import rank_of
from fedrouter.train.wire.messages import Assign, Hello, Regroup, SumTrain
from fedrouter.types import TrainRequest

METHODS: tuple[str, ...] = get_args(Config.model_fields["method"].annotation)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Policy(_Section):
    """Limits on what this site does for a federation; the site refuses anything beyond them."""

    methods: list[str] = Field(default=["fedrouter"])
    """Methods that the site takes part in."""
    max_rank: int = Field(64, ge=1)
    """Maximum rank of an adapter to train."""
    max_steps: int = Field(200, ge=1)
    """Maximum number of optimizer steps per request."""
    min_cluster_size: int = Field(5, ge=1)
    """Minimum number of rows in any revealed group; plans with a smaller number are refused."""
    centroid_noise: float = Field(0.0, ge=0)
    """Minimum noise multiplier for messages before the rounds."""
    update_noise: float = Field(0.0, ge=0)
    """Minimum noise multiplier for updates."""
    labels: bool = True
    """Whether task labels may be revealed; if not, they are removed when rows are read."""
    secure_sum: bool = False
    """Whether to take part only if the server sees sums of updates, never one site's."""
    min_sum: int = Field(3, ge=2)
    """Minimum number of sites in a secure sum, including this one."""
    max_requests_per_day: int = Field(10_000, ge=1)
    """Maximum number of requests per day (UTC)."""
    max_mib_per_day: float = Field(10_000.0, gt=0)
    """Maximum MiB sent per day (UTC)."""

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: list[str]) -> list[str]:
        for method in methods:
            if method not in METHODS:
                close = difflib.get_close_matches(method, METHODS, 1)
                hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(METHODS)}"
                raise ValueError(f"policy.methods: unknown method {method!r}; {hint}")
        return methods


class SiteSettings(_Section):
    """``site.toml``."""

    name: str
    """The client's name in the federation's roster."""
    data: str = Field(min_length=1)
    """File or directory with the rows."""
    base: str | None = None
    """Path of the base model on this machine; by default the server's name for it is used."""
    server: str = "127.0.0.1:9092"
    """HOST:PORT of the federation's superlink."""
    ca: str = "ca.crt"
    """The federation's CA certificate."""
    split: str = "train"
    fields: dict[str, str] = Field(default_factory=dict)
    """Field names of the data, as in ``data.fields`` of a run."""
    ignore: list[str] = Field(default_factory=list)
    device: str = "auto"
    policy: Policy = Field(default_factory=Policy)

    @field_validator("server")
    @classmethod
    def _address(cls, server: str) -> str:
        host, _, port = server.rpartition(":")
        if not host or "/" in host or not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(f"server {server!r}: expected HOST:PORT, for instance server.example.org:9092")
        return server


@dataclass(frozen=True, slots=True)
class Site:
    """One site's directory: settings, key, secret and audit file."""

    directory: Path
    settings: SiteSettings

    @property
    def key(self) -> Path:
        """The private key, which never leaves the site."""
        return self.directory / "site.key"

    @property
    def secret(self) -> Path:
        """The secret for noise and digests, which never leaves the site."""
        return self.directory / "noise.key"

    @property
    def audit(self) -> Path:
        """The audit file; see ``Audit``."""
        return self.directory / "audit.jsonl"

    def place(self, path: str) -> str:
        """Resolve a path relative to the site's directory; return names of no such path unchanged."""
        file = self.directory / Path(path).expanduser()
        return str(file.resolve()) if file.exists() else path

    def source(self) -> str:
        """Return the source of the rows.

        Raises
        ------
        DataError
            If it is a file that does not exist.
        """
        data = self.settings.data
        if names_file(data) and not (self.directory / Path(data).expanduser()).exists():
            raise DataError(
                f"{self.directory / 'site.toml'}: data {data!r}: no such file or directory; "
                f"a relative path is relative to {self.directory}"
            )
        return self.place(data)


def load_site(directory: Path) -> Site:
    """Read a site's ``site.toml``.

    Raises
    ------
    ConfigError
        If it is missing or invalid.
    """
    file = directory / "site.toml"
    command = shlex.join(["fedrouter", "client", "init", directory.name])
    missing = f"{file}: no such file; {command} creates it"
    return Site(directory, fitted(read_toml(file, missing=missing), SiteSettings, str(file)))


def plan_of(hello: Hello, site: Site) -> Config:
    """Return the server's settings with this site's rows, base model and device.

    Raises
    ------
    ConfigError
        If the settings are invalid.
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
        routing = {**values.get("routing", {}), "probes": None}  # this file is on the server
        local = {"base": base, "data": data, "embedder": embedder, "train": train, "routing": routing}
        return validated({**values, **local})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "the server's plan is not valid in this version; install the server's version of fedrouter"
        ) from error


def against_plan(policy: Policy, config: Config, secure: bool) -> str | None:
    """Return why the policy refuses a plan, or None."""
    privacy = config.privacy
    least = {
        "min_cluster_size": (privacy.min_cluster_size, policy.min_cluster_size),
        "centroid_noise": (privacy.centroid_noise, policy.centroid_noise),
        "update_noise": (privacy.update_noise, policy.update_noise),
    }
    violations: Mapping[str, bool] = {
        f"method {config.method} (here: {', '.join(policy.methods)})": config.method not in policy.methods,
        f"rank {config.lora.rank} (at most {policy.max_rank} here)": config.lora.rank > policy.max_rank,
        **{
            f"privacy.{name} {value} (at least {limit} here)": value < limit
            for name, (value, limit) in least.items()
        },
        "method oracle, which asks for labels": config.method == "oracle" and not policy.labels,
        "updates that are not summed": policy.secure_sum and not secure,
        # An endpoint would receive the site's prompts.
        "an embeddings endpoint": config.embedder.kind == "endpoint",
    }
    reasons = [setting for setting, violated in violations.items() if violated]
    return f"its policy refuses {', '.join(reasons)}" if reasons else None


def against_request(policy: Policy, message: object) -> str | None:
    """Return why the policy refuses one request, or None."""
    if isinstance(message, SumTrain):
        return against_request(policy, message.request)
    if isinstance(message, TrainRequest):
        if message.steps > policy.max_steps:
            return f"its policy refuses {number_of(message.steps, 'step')} (at most {policy.max_steps} here)"
        if (rank := rank_of(message.adapter)) > policy.max_rank:
            return f"its policy refuses rank {rank} (at most {policy.max_rank} here)"
    if isinstance(message, Assign | Regroup) and message.told and message.told.tasks and not policy.labels:
        return "its policy refuses to use task labels"
    return None
