"""Statistics of results: means over seeds, the best baseline, and confidence intervals of gains.

FedRouter and the oracle are evaluated with global routing, baselines as published, with the adapters that the
client has (see cell.py). ``routed`` also evaluates baselines with our router over their adapters, which makes
them stronger than published.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from fedrouter.experiment.results import Line
from fedrouter.experiment.settings import Settings
from fedrouter.types import Float64s

DRAWS = 2000  # bootstrap samples
CONFIDENCE = 95.0  # per cent
OURS = "fedrouter"
ONE_ADAPTER = ("fedavg", "fedprox")  # routing makes no difference


@dataclass(frozen=True, slots=True)
class Asked:
    """A method and how it is evaluated."""

    method: str
    routing: str  # "global" | "local"
    tests: str  # "own" | "all"

    @property
    def evaluation(self) -> str:
        """The key of a line's scores."""
        return f"{self.routing}/{self.tests}"


@dataclass(frozen=True, slots=True)
class Scores:
    """All seeds' scores of a (world, scenario, method) in one evaluation."""

    seeds: tuple[int, ...]
    prompts: tuple[Float64s, ...]  # one array per task: (seeds, prompts)

    @property
    def by_seed(self) -> Float64s:
        """(seeds,): the mean over tasks."""
        return np.asarray(np.mean([scores.mean(axis=1) for scores in self.prompts], axis=0))

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
    """Relative gain over another method, with a paired bootstrap interval."""

    over: Asked
    gain: float
    low: float
    high: float
    num_seeds: int  # seeds that both methods have

    @property
    def sure(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


class Results:
    """Lines of results, accessed by world, scenario and method."""

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
        """Return a method's scores for ``seeds`` (None: all); None if there are no results."""
        lines = [li for li in self.of(world, scenario, asked.method) if seeds is None or li["seed"] in seeds]
        if not lines:
            return None
        by_seed = [_prompts(line, asked.evaluation) for line in lines]
        tasks = sorted(by_seed[0])
        return Scores(
            tuple(int(line["seed"]) for line in lines),
            tuple(np.array([scores[task] for scores in by_seed]) for task in tasks),
        )


def native(method: str, tests: str, settings: Settings) -> Asked:
    """Return a method's evaluation as it was published."""
    kind = str(settings.methods[method].get("method", method))
    routed = kind in (OURS, "oracle", *ONE_ADAPTER)
    return Asked(method, "global" if routed else "local", tests)


def baselines(settings: Settings, world: str, tests: str, routed: bool) -> list[Asked]:
    """Return the baselines that do not know the tasks; ``routed``: also with our router."""
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
    """Return the evaluation with the highest mean; None without results."""
    means = {asked: found.mean for asked in among if (found := results.scores(world, scenario, asked))}
    return max(means, key=lambda asked: means[asked], default=None)


def gain(results: Results, world: str, scenario: str, ours: Asked, other: Asked) -> Gain | None:
    """Return the relative gain of ``ours`` over ``other`` on the seeds that both have.

    The interval comes from a paired two-stage bootstrap: seeds are drawn with replacement, then each task's
    prompts; both methods get the same draws.
    """
    ours_all, other_all = (results.scores(world, scenario, asked) for asked in (ours, other))
    if ours_all is None or other_all is None:
        return None
    seeds = sorted(set(ours_all.seeds) & set(other_all.seeds))
    a, b = (results.scores(world, scenario, asked, seeds) for asked in (ours, other))
    if not seeds or a is None or b is None or not b.mean:
        return None
    low, high = np.percentile(drawn_gains(a, b), [(100 - CONFIDENCE) / 2, (100 + CONFIDENCE) / 2])
    return Gain(other, a.mean / b.mean - 1, float(low), float(high), len(seeds))


def drawn_gains(a: Scores, b: Scores, num: int = DRAWS, seed: int = 0) -> Float64s:
    """Return relative gains of ``a`` over ``b`` in bootstrap samples, (num,)."""
    seeds, prompts = _weights(num, len(a.seeds), tuple(scores.shape[1] for scores in a.prompts), seed)
    totals = np.zeros((2, num))
    for weights, *pair in zip(prompts, a.prompts, b.prompts, strict=True):
        totals += [np.einsum("np,np->n", seeds @ scores, weights) for scores in pair]
    return np.asarray(totals[0] / np.maximum(totals[1], 1e-12) - 1)


@cache
def _weights(num: int, seeds: int, prompts: tuple[int, ...], seed: int) -> tuple[Float64s, list[Float64s]]:
    """Return the weights of seeds, (num, seeds), and of each task's prompts, (num, prompts), in samples.

    They are relative frequencies in ``num`` draws with replacement, so rows sum to 1.
    """
    draw = np.random.default_rng(seed)
    all_ = [draw.multinomial(size, np.full(size, 1 / size), num) / size for size in (seeds, *prompts)]
    return all_[0], all_[1:]


def task_means(results: Results, world: str, scenario: str, asked: Asked, metric: str) -> dict[str, float]:
    """Return the mean over seeds in ``metric``, by task."""
    lines = results.of(world, scenario, asked.method)
    by_seed = [evaluation(line, asked.evaluation)["tasks"] for line in lines]
    if not by_seed:
        return {}
    return {task: float(np.mean([seed[task][metric] for seed in by_seed])) for task in sorted(by_seed[0])}


def evaluation(line: Line, name: str) -> Mapping[str, Mapping[str, dict[str, float]]]:
    """Return an evaluation's scores; follows a reference to an equal evaluation."""
    found = line["scores"][name]
    return line["scores"][found["same as"]] if "same as" in found else found  # type: ignore[no-any-return]


def _prompts(line: Line, name: str) -> Mapping[str, Sequence[float]]:
    return evaluation(line, name)["prompts"]  # type: ignore[return-value]
