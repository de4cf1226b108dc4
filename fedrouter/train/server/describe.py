"""Describe task clusters for the bundle (names, rows, clients, radii), and warn if there may be too few."""

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedrouter.bundle import GENERALIST
from fedrouter.config import Config, RoutingSettings
from fedrouter.train.federation import FEW
from fedrouter.train.server.discover import radius
from fedrouter.types import Assignment, Subset, TaskCluster

MIN_RADIUS = 1.0  # absorbs rounding errors if all rows of a task cluster are equal
FEW_GROUPS = 8  # a client with rows for fewer groups of the minimum size can hardly show several tasks


def describe(
    assignments: Sequence[Assignment],
    num_clusters: int,
    routing: RoutingSettings,
    names: Sequence[str | None] | None = None,
    standing: Sequence[TaskCluster] = (),
    taken: Sequence[str] = (),
    whitened: bool = True,
) -> list[TaskCluster]:
    """Describe the task clusters that follow the ``standing`` ones, from their clients' assignments.

    Parameters
    ----------
    names : names of task clusters; where None, the most common task label is used.
    standing : existing task clusters, which come first and are not described again.
    taken : names that must not be used; the task cluster's number is appended to such a name.
    whitened : whether the metric was computed from the rows; never assumed with ``standing`` task clusters.
    """
    rows = sum(s.num_examples for a in assignments for s in a.subsets)
    shaped = rows if whitened and not standing else None
    clusters: list[TaskCluster] = []
    used = {GENERALIST, *taken, *(c.name for c in standing)}
    for k in range(len(standing), num_clusters):
        members: list[tuple[str, Subset]] = [
            (a.client, s) for a in assignments for s in a.subsets if s.cluster == k
        ]
        counts: dict[str, int] = {}
        for _, subset in members:
            for task, count in subset.task_counts.items():
                counts[task] = counts.get(task, 0) + count
        labels = counts.keys() - {FEW}
        common = max(labels, key=lambda t: (counts[t], t)) if labels else f"task-{k}"
        name = _slug((names[k] if names else None) or common)
        while name in used:
            name = f"{name}-{k}"
        used.add(name)
        clusters.append(
            TaskCluster(
                name=name,
                adapter="",
                num_examples=sum(s.num_examples for _, s in members),
                clients=tuple(client for client, _ in members),
                task_counts=dict(sorted(counts.items())),
                radius=radius([s for _, s in members], routing.quantile, shaped) if members else 0.0,
            )
        )
    # A task with very similar rows would reject its own prompts as soon as they differ a little from the
    # rows. So the median radius is the minimum: other tasks show how far prompts of one task may lie apart.
    usual = float(np.median([c.radius for c in [*standing, *clusters] if c.radius] or [0.0]))
    return [
        replace(c, radius=routing.slack * max(c.radius, usual, MIN_RADIUS)) if c.radius or c.clients else c
        for c in clusters
    ]


def doubt(config: Config, rows: Sequence[int], num_clusters: int) -> str | None:
    """Return a warning if several tasks may have been merged into one because most clients have few rows.

    Parameters
    ----------
    rows : number of rows of each client.
    """
    least, asked = config.privacy.min_cluster_size, config.cluster.global_
    few = sum(num < FEW_GROUPS * least for num in rows)
    if config.method != "fedrouter" or asked != "auto" or num_clusters > 1 or 2 * few <= len(rows):
        return None
    return (
        f"one task cluster was found; if there are several tasks, {few} of {len(rows)} clients have too few "
        f"rows to separate them (under {FEW_GROUPS * least}): give them more, or lower "
        f"privacy.min_cluster_size ({least})"
    )


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48] or "task"
