"""More of the routing benchmark: uneven federations, a fifth task that joins later, and costs."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from routing_data import JUDGED, Remembering, deal, scenario

from fedrouter.builtin.tasks import EXTRA_TASKS, TASKS, generate
from fedrouter.bundle import Bundle
from fedrouter.config import ClusterSettings, Count, PrivacySettings, RoutingSettings
from fedrouter.route import Router
from fedrouter.train.client.client import Client
from fedrouter.train.join import placed
from fedrouter.train.local import LocalFederation
from fedrouter.train.server.describe import describe
from fedrouter.train.server.discover import discover
from fedrouter.train.space import nearest
from fedrouter.types import (
    Assignment,
    BaseSpec,
    LocalClusters,
    Membership,
    Record,
    RoutingSpace,
    TaskCluster,
)

SEEDS = 3
ALONE = ", privacy.min_cluster_size 1"  # suffix of shapes in which clients may reveal single rows
Rows = Mapping[str, list[Record]]


def shapes(data: str, four: Sequence[str]) -> dict[str, list[dict[str, int]]]:
    """Return plans, see ``deal``, of uneven federations by name."""
    large = dict.fromkeys(four, 1250 if data == "built-in" else 2000)
    if data == "real":
        large |= {"dialogue_summary": 500, "headline": 500}
    a, b, c, d = four
    found = {
        "20 rows of 4 tasks, 5,000 of 4": [dict.fromkeys(four, 5), large],
        f"20 rows, all of {b}, {sum(large.values()) - large[b]:,} of 3": [
            {b: 20}, {task: num for task, num in large.items() if task != b}],
        f"{b} at one client only": [*[{a: 150, c: 100, d: 150}] * 4, {a: 150, b: 150}],
        "2 clients, dual": [{a: 300, b: 300}, {c: 300, d: 300}],
        "2 clients, all": scenario("all", four, 2, 500),
        "32 clients of 64 rows, dual": scenario("dual", four, 32, 512),
        "32 clients of 64 rows, all": scenario("all", four, 32, 512),
        "128 clients of 16 rows, single": scenario("single", four, 128, 512),
        "128 clients of 16 rows, dual": scenario("dual", four, 128, 512),
        "128 clients of 16 rows, all": scenario("all", four, 128, 512),
        "one task": [{a: 80}] * 5,
    }  # fmt: skip
    found |= {f"{shape}{ALONE}": found[shape] for shape in list(found) if shape.startswith("128")}
    if data == "built-in":
        found["128 clients of 40 rows, all"] = scenario("all", four, 128, 1280)
        for num in (3, 6, 9, 12):
            tasks = (*TASKS, *EXTRA_TASKS)[:num]
            for shape in ("single", "dual", "all"):
                found[f"{num} tasks, {shape}"] = scenario(shape, tasks, max(8, num), 300)
    return found


def federations(
    one: Callable[..., dict[str, Any]],
    embedder: Remembering,
    name: str,
    data: str,
    train: Rows,
    test: Rows | None,
    first: int,
    only: Sequence[str] = ("",),
) -> list[dict[str, Any]]:
    """Cluster and evaluate each federation whose name contains one of ``only``."""
    four = TASKS if data == "built-in" else tuple(train)
    found = []
    for shape, plan in shapes(data, four).items():
        if not any(text in shape for text in only):
            continue
        for seed in range(first, first + SEEDS):
            clients, rest = deal(train, plan, seed)
            tasks = {task for counts in plan for task in counts}
            judged = [r for task in tasks for r in test[task][:JUDGED]] if test else rest
            privacy = PrivacySettings(min_cluster_size=1) if shape.endswith(ALONE) else None
            measured = one(embedder, ClusterSettings(), clients, judged, {}, seed, privacy)
            measured.pop("drawn")
            found.append({"what": "shape", "embedder": name, "data": data, "shape": shape,
                          "num_tasks": len(tasks), "seed": seed, **measured})  # fmt: skip
    return found


def fifth_task(
    embedder: Remembering, name: str, data: str, train: Rows, test: Rows | None, seed: int
) -> list[dict[str, Any]]:
    """Add a client with 300 rows of a further task, as ``fedrouter join`` does; compare accuracies."""
    four = TASKS if data == "built-in" else tuple(train)
    clients, rest = deal(train, scenario("dual", four, 8, 600 if data == "built-in" else 500), seed)
    judged = [r for task in four for r in test[task][:JUDGED]] if test else rest
    bundle = _bundle(embedder, clients, seed)
    before = _by_task(embedder, bundle.space, bundle.clusters, judged)
    found = []
    for task in EXTRA_TASKS:
        rows = generate(task, "train", 300 + JUDGED, 0 if test else 1)
        strange = generate(task, "test", JUDGED, 0) if test else rows[300:]
        late = [Client("late", rows[:300], embedder, seed)]
        federation = LocalFederation(late, trainer=None)  # type: ignore[arg-type]
        placement = placed(bundle, federation, RoutingSettings().quantile)
        space, num = placement.space, placement.space.num_clusters
        new = describe(placement.assignments, num, RoutingSettings(), standing=bundle.clusters)
        after = _by_task(embedder, space, [*bundle.clusters, *new], [*judged, *strange])
        found.append(
            {
                "what": "fifth",
                "embedder": name,
                "data": data,
                "task": task,
                "num_new": len(new),
                "drop": max(before[t] - after[t] for t in before),
                "accuracy": after[task],
            }
        )
    return found


def costs(embedder: Remembering, sets: Mapping[str, tuple[Rows, Rows | None]]) -> list[dict[str, Any]]:
    """Return bytes and seconds of a client with 10,000 rows, and time of embedding + routing ÷ embedding."""
    rows = [r for train, _ in sets.values() for task, records in train.items() for r in records
            if task in TASKS][:10_000]  # fmt: skip
    client = Client("large", rows, embedder, 0)
    federation = Counting([client])
    began = time.process_time()
    space = discover(federation, ClusterSettings(), 0)
    federation.assign(space)
    seconds = time.process_time() - began

    bundle = _bundle(embedder, {"large": rows[:2000]}, 0)
    router = Router(bundle)
    plain, routed = [], []
    for record in rows[-200:]:
        text = [record.turns[-1].content]
        began = time.perf_counter()
        vectors = embedder.embedder.embed(text)
        plain.append(time.perf_counter() - began)
        router.route(vectors)
        routed.append(time.perf_counter() - began)
    return [
        {
            "what": "cost",
            "dim": embedder.spec.dim,
            "num_rows": len(rows),
            "sent_bytes": federation.sent,
            "clustering_s": seconds,
            "routing_ratio": float(np.median(routed) / np.median(plain)),
        }
    ]


class Counting(LocalFederation):
    """Clients that count the bytes sent before the first round: float32, half of symmetric matrices."""

    def __init__(self, clients: Sequence[Client]):
        super().__init__(clients, trainer=None)  # type: ignore[arg-type]
        self.sent = 0

    def summarise(self, num: Count) -> list[LocalClusters]:  # type: ignore[override]
        return self._count(list(super().summarise(num)))

    def regroup(self, space: RoutingSpace, told: Membership | None = None) -> list[LocalClusters]:  # type: ignore[override]
        return self._count(list(super().regroup(space, told)))

    def assign(self, space: RoutingSpace, told: Membership | None = None) -> list[Assignment]:
        found = super().assign(space, told)
        self.sent += sum(4 * len(s.distances) + 8 for a in found for s in a.subsets)
        return found

    def _count(self, revealed: list[Any]) -> list[Any]:
        for message in revealed:
            for array in (getattr(message, field) for field in message.__dataclass_fields__):
                square = array.ndim > 1 and array.shape[-1] == array.shape[-2]
                half = (array.shape[-1] + 1) / (2 * array.shape[-1]) if square else 1
                self.sent += int(4 * array.size * half)
        return revealed


def summary(more: list[dict[str, Any]]) -> list[tuple[str, str, str, bool | None]]:
    """Return one line for each shape, for all fifth tasks of a data set, and for each cost."""
    rows: list[tuple[str, str, str, bool | None]] = []
    groups = defaultdict(list)
    for run in more:
        if run["what"] == "shape":
            groups[run["embedder"], run["data"], run["shape"]].append(run)
    for (embedder, data, shape), runs in groups.items():
        numbers = " ".join(str(run["num_clusters"]) for run in runs)
        accuracy = np.mean([run["accuracy"] for run in runs])
        wanted = runs[0]["num_tasks"]
        rows.append((f"{embedder}, {data}, {shape}", f"{numbers}; {accuracy:.4f}", f"{wanted}; ≥ 0.97",
                     bool(accuracy >= 0.97) and all(run["found"] for run in runs)))  # fmt: skip
    late = defaultdict(list)
    for run in more:
        if run["what"] == "fifth":
            late[run["embedder"], run["data"]].append(run)
    for (embedder, data), runs in late.items():
        drop = max(run["drop"] for run in runs)
        lowest = min(run["accuracy"] for run in runs)
        rows += [
            (f"{embedder}, {data}, {len(runs)} fifth tasks: largest drop of another task", f"{drop:.4f}",
             "≤ 0.01", drop <= 0.01 + 1e-9),
            ("  lowest accuracy of a fifth task", f"{lowest:.4f}", "", None),
        ]  # fmt: skip
    for run in more:
        if run["what"] == "cost":
            rows += [
                (f"sent by a client before the first round, d = {run['dim']}", f"{run['sent_bytes']:,} bytes",
                 "≤ 1,000,000", run["sent_bytes"] <= 1_000_000),
                (f"clustering {run['num_rows']:,} rows, one core", f"{run['clustering_s']:.2f} s", "≤ 10 s",
                 run["clustering_s"] <= 10),
                ("embedding and routing a prompt ÷ embedding it", f"{run['routing_ratio']:.3f}", "≤ 1.1",
                 run["routing_ratio"] <= 1.1),
            ]  # fmt: skip
    return rows


def _bundle(embedder: Remembering, clients: Mapping[str, list[Record]], seed: int) -> Bundle:
    """Return a bundle for routing only, without adapters and not on disk."""
    federation = LocalFederation([Client(n, r, embedder, seed) for n, r in clients.items()], trainer=None)  # type: ignore[arg-type]
    space = discover(federation, ClusterSettings(), seed)
    clusters = describe(federation.assign(space), max(space.cluster_of) + 1, RoutingSettings())
    return Bundle(Path(), BaseSpec("", None, ""), embedder.spec, tuple(clusters), space,
                  np.zeros((3, embedder.spec.dim), np.float32), 1, "base", None, {}, (), {}, {})  # fmt: skip


def _by_task(
    embedder: Remembering, space: RoutingSpace, clusters: Sequence[TaskCluster], judged: Sequence[Record]
) -> dict[str, float]:
    names = np.array([max(c.task_counts, key=lambda t: (c.task_counts[t], t), default="") for c in clusters])
    right = names[np.asarray(space.cluster_of)[nearest(embedder.prompts(judged), space)[0]]]
    tasks = np.array([r.task for r in judged])
    return {str(t): float((right[tasks == t] == t).mean()) for t in dict.fromkeys(tasks)}
