"""What the hook needs to know, as one object: ``launch`` writes it, the hook reads it at start-up.

vLLM constructs the hook in its own processes, so the object travels in an environment variable. API keys are
not part of it: they have environment variables of their own.
"""

import os
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedrouter.errors import ServingError
from fedrouter.serve.decision_log import LogOptions
from fedrouter.serve.limits import Limits

VARIABLE = "FEDROUTER_SETTINGS"


class Settings(BaseModel):
    """What to serve, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, ser_json_inf_nan="constants")

    bundle: Path
    """Directory of the served bundle."""
    bundle_root: Path | None = None
    """The only directory that a reload takes bundles from; None: no reloads."""
    base: str | None = None
    """The base model's directory or hub id, if not the one that the bundle names."""
    embedder_url: str | None = None
    """Address of the embeddings endpoint, if the bundle's embedder is one."""
    fallback: str | None = None
    """Overrides the bundle's fallback."""
    signed_by: Path | None = None
    """Public key that must have signed every bundle; None: bundles need no signature."""
    limits: Limits = Field(default_factory=Limits)
    keys_file: Path | None = None
    """API keys of clients, see ``access.load_keys``."""
    log: LogOptions | None = None
    watch: Path | None = None
    """Symbolic link to a bundle, followed by reloads."""
    second: Path | None = None
    """Directory of a second bundle, which routes every request too."""
    canary: float = 0.0
    """Share of requests that the second bundle answers, 0 to 1."""
    console: bool = True

    def to_env(self) -> dict[str, str]:
        """Return the environment that carries the settings to another process."""
        return {VARIABLE: self.model_dump_json()}


def read_settings() -> Settings:
    """Read the settings from this process's environment.

    Raises
    ------
    ServingError
        If they are missing or invalid.
    """
    if VARIABLE not in os.environ:
        raise ServingError(f"{VARIABLE} is not set: start the server with `fedrouter serve BUNDLE`")
    try:
        settings = Settings.model_validate_json(os.environ[VARIABLE])
    except ValidationError as error:
        first = error.errors()[0]
        problem = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise ServingError(f"environment variable {VARIABLE} is invalid: {problem}") from error
    log = settings.log
    if log is None or "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return settings
    # vLLM sets that variable when it runs several API processes: each gets a log file of its own.
    path = log.path.with_name(f"{log.path.stem}.{os.getpid()}{log.path.suffix}")
    return settings.model_copy(update={"log": replace(log, path=path)})
