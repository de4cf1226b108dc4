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
    """A base model, clients' data, and what the result is tested with."""

    tests: list[str] = Field(min_length=1)
    """Test records: files (with * for several), hub data sets, or ``builtin:four-tasks``."""
    unseen: list[str] = Field(default_factory=list)
    """Test records of no task that is trained: who should answer those?"""
    metric: Literal["rouge_1", "rouge_l", "exact_match"] = "rouge_1"
    num_per_task: int = Field(60, ge=1)
    """Test prompts a task: the first ones."""
    max_tokens: int = Field(64, ge=1)
    """Most tokens of an answer."""
    label: str = ""
    """What tables call it."""
    parameters: int | None = Field(None, ge=1)
    """Of the base, for the picture of scores over sizes."""
    curve: list[str] = Field(default_factory=list)
    """Methods that are tested after every round too, with the first seed, scenario dual."""
    methods: list[str] | None = None
    """Of all methods those; without: all."""
    scenarios: list[Scenario] | None = None
    seeds: list[int] | None = None
    rates: dict[str, float] = Field(default_factory=dict)
    """Learning rates by method, found before; without, ``search`` finds them."""
    learning_rates: list[float] | None = None
    """Those that are searched here, instead of the search's own."""
    run: Values = Field(default_factory=dict)
    """Sections of a training configuration, over the experiment's own."""


class Search(_Section):
    """A small search of each method's learning rate, judged by rows that are not trained on."""

    learning_rates: list[float] = Field(min_length=1)
    scenario: Scenario = "dual"
    seed: int = 0
    """None of the grid's."""
    validation: float = Field(0.1, gt=0, le=0.5)


class Settings(_Section):
    """A whole experiment."""

    seeds: list[int] = Field(min_length=1)
    scenarios: list[Scenario] = ["single", "dual", "all"]
    methods: dict[str, Values] = Field(min_length=1)
    """By name: sections of a training configuration. ``method`` is the name if not given; ``given = true``
    sets ``cluster.global`` to the number of tasks (for k-means ``cluster.local`` too); ``told = true``: it
    knows more than clients would, and is no baseline."""
    worlds: dict[str, World] = Field(min_length=1)
    search: Search | None = None
    rate_end: float = Field(0.05, ge=0, le=1)
    """Where the learning rate ends, as a share of where it begins."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """Who answers test prompts: transformers beside the training, or one vLLM for all cells."""
    run: Values = Field(default_factory=dict)
    """Sections of a training configuration that all cells share."""

    @model_validator(mode="after")
    def _names_fit(self) -> "Settings":
        for name, world in self.worlds.items():
            unknown = {*(world.methods or ()), *world.rates, *world.curve} - self.methods.keys()
            if unknown:
                raise ValueError(f"worlds.{name} names no method of this experiment: {sorted(unknown)}")
        for name in (*self.worlds, *self.methods):
            if "/" in name or name.startswith("."):
                raise ValueError(f"the name {name!r} becomes a directory: write it without / and leading dot")
        return self


def load_experiment(path: Path) -> Settings:
    """Read an experiment's TOML file; relative paths in it are resolved against its directory.

    Raises
    ------
    ConfigError
        For a missing file, TOML that does not parse, an unknown key or a value that does not fit.
    """
    values = read_toml(path, f"experiment {path}")
    for run in _runs(values):
        resolve_paths(run, path.parent)
    for world in _tables(values.get("worlds")).values():
        for key in ("tests", "unseen"):
            if isinstance(world.get(key), list):
                world[key] = [found for source in world[key] for found in _found(str(source), path.parent)]
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


def _found(source: str, directory: Path) -> list[str]:
    if is_builtin(source):
        return [source]
    paths = sorted(glob.glob(str(directory / source)))  # noqa: PTH207 - the pattern may begin with ..
    return [str(Path(p).resolve()) for p in paths] or [source]  # a hub id, or refused when it is read
