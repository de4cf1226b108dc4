"""An experiment's configuration file."""

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedrouter.builtin import is_builtin
from fedrouter.config_file import read_toml, resolve_paths
from fedrouter.errors import ConfigError

Scenario = Literal["single", "dual", "all"]
Values = dict[str, Any]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class World(_Section):
    """A base model, the clients' data, and the test data."""

    tests: list[str] = Field(min_length=1)
    """Test records: files (with * for several), hub data sets, or ``builtin:four-tasks``."""
    unseen: list[str] = Field(default_factory=list)
    """Test records of untrained tasks."""
    metric: Literal["rouge_1", "rouge_l", "exact_match"] = "rouge_1"
    """Metric of tables and figures."""
    num_per_task: int = Field(60, ge=1)
    """Number of test prompts per task; the first ones are used."""
    max_tokens: int = Field(64, ge=1)
    """Maximum number of tokens per answer."""
    label: str = ""
    """Name in tables; empty: the world's key."""
    parameters: int | None = Field(None, ge=1)
    """Number of the base's parameters, for the figure of scores over sizes; unset: not in that figure."""
    curve: list[str] = Field(default_factory=list)
    """Methods that are also tested after every round, with the first seed in scenario dual."""
    methods: list[str] | None = None
    """Methods to run; unset: all of the experiment's."""
    scenarios: list[Scenario] | None = None
    """Scenarios to run; unset: all of the experiment's."""
    seeds: list[int] | None = None
    """Seeds to run; unset: all of the experiment's."""
    rates: dict[str, float] = Field(default_factory=dict)
    """Known learning rates by method; ``search`` finds the others."""
    learning_rates: list[float] | None = None
    """Learning rates to search; unset: those in ``search``."""
    run: Values = Field(default_factory=dict)
    """Sections of a training configuration, which override the experiment's."""


class Search(_Section):
    """A search for each method's learning rate by validation loss."""

    learning_rates: list[float] = Field(min_length=1)
    """Learning rates to try."""
    scenario: Scenario = "dual"
    """Scenario of the search."""
    seed: int = 0
    """Seed of the search; should differ from the grid's seeds."""
    validation: float = Field(0.1, gt=0, le=0.5)
    """Share of each subset's rows held out for validation."""


class Settings(_Section):
    """A whole experiment."""

    seeds: list[int] = Field(min_length=1)
    """Seeds of the grid."""
    scenarios: list[Scenario] = ["single", "dual", "all"]
    """Partitions of the data among clients."""
    methods: dict[str, Values] = Field(min_length=1)
    """Sections of a training configuration by the method's name. ``method`` defaults to that name.
    ``given = true`` sets ``cluster.global`` to the number of tasks, and with k-means ``cluster.local`` to the
    number of a client's tasks. ``told = true`` marks a method that knows the tasks and so is no baseline."""
    worlds: dict[str, World] = Field(min_length=1)
    """Worlds by name."""
    search: Search | None = None
    """Search for learning rates; unset: they are as configured."""
    rate_end: float = Field(0.05, ge=0, le=1)
    """Final learning rate as a share of the initial one."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """Engine that generates answers: transformers in each cell's process, or one vLLM for all cells."""
    run: Values = Field(default_factory=dict)
    """Sections of a training configuration for all cells."""

    @model_validator(mode="after")
    def _names_fit(self) -> "Settings":
        for name, world in self.worlds.items():
            unknown = {*(world.methods or ()), *world.rates, *world.curve} - self.methods.keys()
            if unknown:
                raise ValueError(f"worlds.{name} names unknown methods: {sorted(unknown)}")
        for name in (*self.worlds, *self.methods):
            if "/" in name or name.startswith("."):
                raise ValueError(
                    f"the name {name!r} becomes a directory: it must not contain / or begin with a dot"
                )
        return self


def load_experiment(path: Path) -> Settings:
    """Read an experiment's TOML file; relative paths in it are resolved against its directory.

    Raises
    ------
    ConfigError
        If the file is missing or not TOML, a key is unknown or a value is invalid.
    """
    values = read_toml(path, f"experiment {path}")
    for run in _runs(values):
        resolve_paths(run, path.parent)
    for world in _tables(values.get("worlds")).values():
        for key in ("tests", "unseen"):
            if isinstance(world.get(key), list):
                world[key] = [name for source in world[key] for name in _expand(str(source), path.parent)]
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        ]
        raise ConfigError(f"experiment {path}: " + "; ".join(lines)) from error


def _runs(values: Values) -> list[Values]:
    tables = [values, *_tables(values.get("worlds")).values()]
    runs = [table["run"] for table in tables if isinstance(table.get("run"), dict)]
    return [*runs, *_tables(values.get("methods")).values()]


def _tables(value: Any) -> Mapping[str, Values]:
    return {k: v for k, v in value.items() if isinstance(v, dict)} if isinstance(value, dict) else {}


def _expand(source: str, directory: Path) -> list[str]:
    if is_builtin(source):
        return [source]
    paths = sorted(glob.glob(str(directory / source)))  # noqa: PTH207 - the pattern may begin with ..
    return [str(Path(p).resolve()) for p in paths] or [source]  # a hub id, or an error when it is read
