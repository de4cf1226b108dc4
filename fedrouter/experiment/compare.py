"""What results say: means over seeds, the best baseline, and how sure a difference is.

A method is asked in one way or another (cell.py): FedRouter and the oracle route among all task clusters;
a baseline answers with what the asking client has, as it was published. ``routed`` puts our router before a
baseline's adapters as well: a stronger baseline that nobody published.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from fedrouter.experiment.results import Line
from fedrouter.experiment.settings import Settings
from fedrouter.types import Float64s

DRAWS = 2000  # of the bootstrap
SURE = 95.0  # per cent that an interval holds
OURS = "fedrouter"
ONE_ADAPTER = ("fedavg", "fedprox")  # whoever asks, whatever is routed


@dataclass(frozen=True, slots=True)
class Asked:
    """A method, and how it is asked."""

    method: str
    routing: str  # "global" | "local"
    tests: str  # "own" | "all"

    @property
    def evaluation(self) -> str:
        """The key of a line's scores."""
        return f"{self.routing}/{self.tests}"


@dataclass(frozen=True, slots=True)
class Scores:
    """All seeds' scores of one (world, scenario, method), asked in one way."""

    seeds: tuple[int, ...]
    prompts: tuple[Float64s, ...]  # a task each: (seeds, prompts)

    @property
    def by_seed(self) -> Float64s:
        """(seeds,): the mean over tasks."""
        return np.asarray(np.mean([own.mean(axis=1) for own in self.prompts], axis=0))

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return float(self.by_seed.mean())

    @property
    def spread(self) -> float:
        """The standard deviation over seeds (n - 1)."""
        return float(self.by_seed.std(ddof=1)) if len(self.seeds) > 1 else float("nan")


@dataclass(frozen=True, slots=True)
class Gain:
    """How much better one is than another, relative; with a paired bootstrap interval."""

    over: Asked
    gain: float
    low: float
    high: float
    num_seeds: int  # that both have

    @property
    def sure(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


class Results:
    """Lines of results, looked into by world, scenario and method."""

    def __init__(self, lines: Iterable[Line]):
        self.lines = [line for line in lines if "scores" in line]
        self._by = {(li["world"], li["scenario"], li["method"], li["seed"]): li for li in self.lines}

    def of(self, world: str, scenario: str, method: str) -> list[Line]:
        """Return a method's lines, by seed."""
        found = [li for (w, s, m, _), li in self._by.items() if (w, s, m) == (world, scenario, method)]
        return sorted(found, key=lambda line: int(line["seed"]))

    def scores(
        self, world: str, scenario: str, asked: Asked, seeds: Sequence[int] | None = None
    ) -> Scores | None:
        """Return a method's scores, of ``seeds`` or of all there are; None without any."""
        lines = [li for li in self.of(world, scenario, asked.method) if seeds is None or li["seed"] in seeds]
        if not lines:
            return None
        kept = [_prompts(line, asked.evaluation) for line in lines]
        tasks = sorted(kept[0])
        return Scores(
            tuple(int(line["seed"]) for line in lines),
            tuple(np.array([own[task] for own in kept]) for task in tasks),
        )


def native(method: str, tests: str, settings: Settings) -> Asked:
    """Return how a method is asked as it was published."""
    kind = str(settings.methods[method].get("method", method))
    routed = kind in (OURS, "oracle", *ONE_ADAPTER)
    return Asked(method, "global" if routed else "local", tests)


def baselines(settings: Settings, world: str, tests: str, routed: bool) -> list[Asked]:
    """Return the baselines that are not told a task; ``routed``: with our router before them as well."""
    found = []
    for method in settings.worlds[world].methods or settings.methods:
        values = settings.methods[method]
        kind = values.get("method", method)
        if kind in (OURS, "oracle") or values.get("told"):
            continue
        found.append(native(method, tests, settings))
        if routed and kind not in ONE_ADAPTER:
            found.append(Asked(method, "global", tests))
    return found


def best(results: Results, world: str, scenario: str, among: Sequence[Asked]) -> Asked | None:
    """Return who has the highest mean."""
    means = {asked: found.mean for asked in among if (found := results.scores(world, scenario, asked))}
    return max(means, key=lambda asked: means[asked], default=None)


def gain(results: Results, world: str, scenario: str, ours: Asked, other: Asked) -> Gain | None:
    """Return the relative gain of ``ours`` over ``other``, over the seeds that both have.

    The interval comes from a paired bootstrap in two stages: seeds are drawn with replacement, then each
    task's prompts, the same ones for both.
    """
    ours_all, other_all = (results.scores(world, scenario, asked) for asked in (ours, other))
    if ours_all is None or other_all is None:
        return None
    seeds = sorted(set(ours_all.seeds) & set(other_all.seeds))
    a, b = (results.scores(world, scenario, asked, seeds) for asked in (ours, other))
    if not seeds or a is None or b is None or not b.mean:
        return None
    low, high = np.percentile(drawn_gains(a, b), [(100 - SURE) / 2, (100 + SURE) / 2])
    return Gain(other, a.mean / b.mean - 1, float(low), float(high), len(seeds))


def drawn_gains(a: Scores, b: Scores, num: int = DRAWS, seed: int = 0) -> Float64s:
    """Return relative gains of ``a`` over ``b`` in bootstrap samples, (num,)."""
    seeds, prompts = _weights(num, len(a.seeds), tuple(own.shape[1] for own in a.prompts), seed)
    totals = np.zeros((2, num))
    for weights, *pair in zip(prompts, a.prompts, b.prompts, strict=True):
        totals += [np.einsum("np,np->n", seeds @ scores, weights) for scores in pair]
    return np.asarray(totals[0] / np.maximum(totals[1], 1e-12) - 1)


@cache
def _weights(num: int, seeds: int, prompts: tuple[int, ...], seed: int) -> tuple[Float64s, list[Float64s]]:
    """Return what each seed, and each prompt of each task, counts in ``num`` bootstrap samples.

    Drawing with replacement is drawing how often each comes: (num, seeds) and a (num, prompts) a task, whose
    rows sum to 1.
    """
    draw = np.random.default_rng(seed)
    all_ = [draw.multinomial(size, np.full(size, 1 / size), num) / size for size in (seeds, *prompts)]
    return all_[0], all_[1:]


def task_means(results: Results, world: str, scenario: str, asked: Asked, metric: str) -> dict[str, float]:
    """Return the mean over seeds in ``metric``, by task."""
    lines = results.of(world, scenario, asked.method)
    own = [evaluation(line, asked.evaluation)["tasks"] for line in lines]
    return {task: float(np.mean([o[task][metric] for o in own])) for task in sorted(own[0])} if own else {}


def evaluation(line: Line, name: str) -> Mapping[str, Mapping[str, dict[str, float]]]:
    """Return an evaluation's scores, which may stand under the name of another one."""
    found = line["scores"][name]
    return line["scores"][found["same as"]] if "same as" in found else found  # type: ignore[no-any-return]


def _prompts(line: Line, name: str) -> Mapping[str, Sequence[float]]:
    return evaluation(line, name)["prompts"]  # type: ignore[return-value]
