"""An experiment's settings → cells; a cell → its training configuration."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache
from typing import Any

from pydantic import ValidationError

from fedrouter.config import Config
from fedrouter.errors import ConfigError
from fedrouter.evaluate import TaggedRecord, first_of_each_task, load
from fedrouter.experiment.settings import Settings, Values, World

FLAGS = ("given", "told")  # keys of a method that are not part of a training configuration
ALL_CHECKPOINTS = 1000


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: a method in a scenario of a world, with a seed."""

    world: str
    scenario: str
    method: str
    seed: int
    rate: float | None = None  # learning rate; None: as configured
    search: bool = False  # trained for the learning rate search, not tested

    @property
    def key(self) -> str:
        """The cell's unique name and relative directory."""
        name = f"{self.world}/{self.scenario}/{self.method}/{self.seed}"
        return f"search/{name}/{self.rate:g}" if self.search else name


def cells_of(settings: Settings, only: Sequence[str] = ()) -> list[Cell]:
    """Return the grid's cells, ordered by seed, so that an interrupted grid has complete comparisons.

    Parameters
    ----------
    only : patterns of keys (``english-6m/*``); empty: all cells.

    Raises
    ------
    ConfigError
        If no cell matches.
    """
    cells = [
        Cell(name, scenario, method, seed)
        for name, world in settings.worlds.items()
        for seed in world.seeds or settings.seeds
        for scenario in world.scenarios or settings.scenarios
        for method in world.methods or settings.methods
    ]
    kept = [c for c in cells if not only or any(fnmatch(c.key, pattern) for pattern in only)]
    if not kept:
        raise ConfigError(f"no cell of this experiment matches {', '.join(only)}")
    return kept


def search_of(settings: Settings, cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells of the learning rate search for ``cells``."""
    search = settings.search
    if search is None:
        return []
    pairs = dict.fromkeys(
        (c.world, c.method) for c in cells if c.method not in settings.worlds[c.world].rates
    )
    return [
        Cell(world, search.scenario, method, search.seed, rate, search=True)
        for world, method in pairs
        for rate in settings.worlds[world].learning_rates or search.learning_rates
    ]


def with_rate(settings: Settings, cell: Cell, losses: Mapping[float, float]) -> Cell:
    """Return the cell with its learning rate: the world's, else the best in ``losses``, else as configured.

    Parameters
    ----------
    losses : validation loss by learning rate.
    """
    given = settings.worlds[cell.world].rates.get(cell.method)
    best = min(losses, key=lambda rate: (losses[rate], rate), default=None)
    return replace(cell, rate=given if given is not None else best)


def config_of(settings: Settings, cell: Cell, num_tasks: int) -> Config:
    """Return a cell's training configuration: sections of the experiment, the world, the method, the cell.

    Later ones override earlier ones.

    Raises
    ------
    ConfigError
        If the settings do not fit together.
    """
    world = settings.worlds[cell.world]
    method = settings.methods[cell.method]
    values = copy.deepcopy(settings.run)
    for more in (world.run, {k: v for k, v in method.items() if k not in FLAGS}):
        merge(values, more)
    values.setdefault("method", cell.method)
    merge(values, {"seed": cell.seed, "data": {"partition": cell.scenario}})
    if values["method"] not in ("fedrouter", "clustered"):
        values.pop("cluster", None)
    elif method.get("given"):
        merge(values, {"cluster": {"global": num_tasks}})
        if values["cluster"].get("method") == "kmeans":
            num_client_tasks = {"single": 1, "dual": 2}.get(cell.scenario, num_tasks)
            merge(values, {"cluster": {"local": num_client_tasks}})
    if cell.rate is not None:
        rates = {"learning_rate": cell.rate, "learning_rate_end": settings.rate_end * cell.rate}
        merge(values, {"train": rates})
    if has_curve(settings, cell):
        merge(values, {"train": {"keep_checkpoints": ALL_CHECKPOINTS}})
    if cell.search and settings.search:
        merge(values, {"train": {"validation": settings.search.validation}})
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        )
        raise ConfigError(f"cell {cell.key}: {problems}") from error


def is_shown(settings: Settings, cell: Cell) -> bool:
    """Return whether figures show this cell: scenario dual, first seed."""
    first = (settings.worlds[cell.world].seeds or settings.seeds)[0]
    return (cell.scenario, cell.seed, cell.search) == ("dual", first, False)


def has_curve(settings: Settings, cell: Cell) -> bool:
    """Return whether a cell is tested after every round."""
    return cell.method in settings.worlds[cell.world].curve and is_shown(settings, cell)


def questions_of(world: World) -> list[TaggedRecord]:
    """Return a world's test records."""
    return _records(tuple(world.tests), world.num_per_task)


def unseen_of(world: World) -> list[TaggedRecord]:
    """Return a world's test records of untrained tasks."""
    return _records(tuple(world.unseen), world.num_per_task)


def merge(values: Values, more: Mapping[str, Any]) -> None:
    """Merge ``more`` into ``values``, section by section; ``more`` overrides."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            merge(values[key], value)
        else:
            values[key] = copy.deepcopy(value)


@cache
def _records(sources: tuple[str, ...], num_per_task: int) -> list[TaggedRecord]:
    return first_of_each_task(load(sources, num_per_task=num_per_task), num_per_task)
