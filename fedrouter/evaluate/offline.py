"""Evaluation of a bundle's routing on labelled records, without a server.

Accuracy, confusion, calibration and abstention.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from sklearn.metrics import roc_auc_score

from fedrouter.bundle import Bundle
from fedrouter.config_file import read_resolved
from fedrouter.decide import route_texts
from fedrouter.embed import Embedder, routing_text
from fedrouter.errors import DataError
from fedrouter.evaluate.report import write_lines
from fedrouter.evaluate.scores import TaggedRecord
from fedrouter.layout import Whole
from fedrouter.partition import check_labels
from fedrouter.route import Router
from fedrouter.types import Decision

FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # factors on the bundle's radii for the abstention curve

FARTHEST = 1e9  # radii; finite stand-in for the infinite distance of prompts without text


@dataclass(frozen=True, slots=True)
class TaskRouting:
    """The routing of one task's prompts."""

    known: bool  # whether the bundle was trained on rows of this task
    num_examples: int
    accuracy: float | None  # share whose nearest task cluster is of this task; None for unknown tasks
    within: float  # share within the nearest task cluster's radius
    confusion: dict[str, int]  # prompts by nearest task cluster
    ratios: tuple[float, ...]  # (101,), distance ÷ radius at quantiles 0 %, 1 % … 100 %


@dataclass(frozen=True, slots=True)
class Abstention:
    """The routing with all radii multiplied by ``factor``; shares are means over tasks."""

    factor: float
    known_rejected: float | None  # None without known tasks
    unknown_rejected: float | None  # None without unknown tasks
    answered_right: float | None  # of known tasks' prompts within the radius; None if there are none


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """A bundle's routing of labelled records."""

    by_task: dict[str, TaskRouting]
    accuracy: float | None  # mean over known tasks
    within: float | None  # mean over known tasks
    stated: float | None  # expected value of ``within``: the quantile that the radii were computed for
    auroc: float | None  # of distance ÷ radius, unknown against known tasks, with equal weights for tasks
    curve: tuple[Abstention, ...]


def evaluate_routing(
    bundle: Bundle, embedder: Embedder, records: Sequence[TaggedRecord], stated: float | None = None
) -> RoutingReport:
    """Route the records and compare the decisions with their labels.

    Parameters
    ----------
    records : sequence of TaggedRecord
        Records of unknown tasks should be rejected.
    stated : float or None
        The quantile that the bundle's radii were computed for.

    Raises
    ------
    DataError
        If there are no records, one has no task, or the bundle was trained without task labels.
    """
    if not records:
        raise DataError("no records to route; give at least one file with rows")
    check_labels("an evaluation of routing", [tagged.record for tagged in records])
    tasks_of = {c.name: _most_common(c.task_counts) for c in bundle.clusters}
    trained = {task for c in bundle.clusters for task in c.task_counts}
    if not trained:
        raise DataError(f"{bundle.path}: trained without task labels, so its routing cannot be evaluated")
    decisions = route_texts(
        Router(bundle), embedder, [routing_text(tagged.record.turns) for tagged in records]
    )
    tasks = np.array([tagged.task for tagged in records])
    right = np.array([task in tasks_of.get(d.cluster, ()) for d, task in zip(decisions, tasks, strict=True)])
    far = np.array([_far(d) for d in decisions])
    by_task = {}
    for task in sorted(set(tasks)):
        rows = np.flatnonzero(tasks == task)
        known = task in trained
        by_task[str(task)] = TaskRouting(
            known=known,
            num_examples=len(rows),
            accuracy=float(right[rows].mean()) if known else None,
            within=float((far[rows] <= 1).mean()),
            confusion=dict(sorted(Counter(decisions[i].cluster for i in rows).items())),
            ratios=tuple(np.quantile(np.minimum(far[rows], FARTHEST), np.linspace(0, 1, 101)).tolist()),
        )
    is_known = np.array([by_task[task].known for task in tasks])
    weights = 1 / np.array([by_task[task].num_examples for task in tasks])  # equal weights for tasks
    return RoutingReport(
        by_task=by_task,
        accuracy=_mean(right, weights, is_known),
        within=_mean(far <= 1, weights, is_known),
        stated=stated,
        auroc=float(roc_auc_score(~is_known, np.minimum(far, FARTHEST), sample_weight=weights))
        if len(set(is_known)) == 2
        else None,
        curve=tuple(
            Abstention(
                factor,
                known_rejected=_mean(far > factor, weights, is_known),
                unknown_rejected=_mean(far > factor, weights, ~is_known),
                answered_right=_mean(right, weights, is_known & (far <= factor)),
            )
            for factor in FACTORS
        ),
    )


def _most_common(counts: Mapping[str, int]) -> set[str]:
    """Return a task cluster's task; several if they have equally many rows."""
    return {task for task, count in counts.items() if count == max(counts.values())}


def stated_quantile(directory: Path) -> float | None:
    """Return the quantile that a bundle's radii were computed for; None for a bundle without its run.

    Also None if ``routing.slack`` has changed the radii.

    Raises
    ------
    ConfigError
        If the run's configuration is damaged.
    """
    file = directory.parent / "config.json"
    if not file.is_file():
        return None
    routing = read_resolved(file).routing
    return routing.quantile if routing.slack == 1 else None


def render(report: RoutingReport) -> RenderableType:
    """Format the report for a terminal."""
    names = sorted({name for task in report.by_task.values() for name in task.confusion})
    table = Table("task", "records", "right", "in radius", title="prompts by nearest task cluster")
    for name in names:
        table.add_column(name, justify="right")
    for label, task in report.by_task.items():
        cells = [str(task.confusion.get(name, 0)) for name in names]
        table.add_row(label, str(task.num_examples), _share(task.accuracy), _share(task.within), *cells)
    curve = Table("radius ×", "known rejected", "unknown rejected", "right if answered", title="abstention")
    for step in report.curve:
        shares = (step.known_rejected, step.unknown_rejected, step.answered_right)
        curve.add_row(f"{step.factor:g}", *map(_share, shares))
    lines = [f"right: {_share(report.accuracy)}, mean over tasks that the bundle knows"]
    stated = "" if report.stated is None else f", stated {_share(report.stated)}"
    lines.append(f"in radius: {_share(report.within)}{stated}")
    if report.auroc is not None:
        lines.append(f"AUROC of distance ÷ radius, unknown against known tasks: {report.auroc:.3f}")
    return Group(Whole(table), Whole(curve), *map(Text, lines))


def to_json(report: RoutingReport) -> str:
    """Return the report as JSON."""
    return json.dumps(asdict(report), ensure_ascii=False, indent=2)


def write_json(report: RoutingReport, path: Path) -> None:
    """Write the report atomically."""
    write_lines(path, [to_json(report)])


def _far(decision: Decision) -> float:
    return decision.distance / decision.radius if decision.radius > 0 else float("inf")


def _mean(values: np.ndarray, weights: np.ndarray, chosen: np.ndarray) -> float | None:
    return float(np.average(values[chosen], weights=weights[chosen])) if chosen.any() else None


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
