"""Clustering and routing without adapters: way × embedder × data × scenario × seed.

python benchmarks/routing.py                   the built-in tasks, and the real ones if ../shared is there
python benchmarks/routing.py --shapes 128      only the federations of other shapes whose names have that
python benchmarks/routing.py --part validation rows of the train files that no client got, to choose by

Ways: FedRouter's default with nothing given ("auto"), on 20 seeds; on the first 5 of them the paper's
(k-means twice, plain Euclid, 4 given) and what a user would pick instead (rivals.py). Then federations of
other shapes, a fifth task that comes later, and what it costs (routing_more.py).
"""

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import routing_more
from common import ROOT, report
from rivals import auroc, nearest_rows, semantic_router, task_weights
from routing_data import JUDGED, Remembering, data_sets, deal, embedders, scenario, unseen

from fedrouter.builtin.tasks import TASKS
from fedrouter.config import ClusterSettings, PrivacySettings, RoutingSettings
from fedrouter.train.client import Client
from fedrouter.train.cluster import crowd, nearest
from fedrouter.train.describe import describe
from fedrouter.train.discover import discover
from fedrouter.train.local import LocalFederation
from fedrouter.types import Array, Record

SCENARIOS = ("single", "dual", "all")
WAYS = {
    "fedrouter": ClusterSettings(),
    "paper": ClusterSettings.model_validate({"method": "kmeans", "local": 4, "global": 4}),
}
ROWS = 600  # of a task, shared by 8 clients
NUM_COMPARED = 5  # seeds on which other ways run


def one(
    embedder: Remembering,
    settings: ClusterSettings,
    clients: dict[str, list[Record]],
    judged: Sequence[Record],
    strange: dict[str, Array],
    seed: int,
    privacy: PrivacySettings | None = None,
) -> dict[str, Any]:
    """Cluster one federation and route what no client has seen."""
    small = crowd(clients)
    members = [Client(n, r, embedder, seed, privacy, whole=n in small) for n, r in clients.items()]
    federation = LocalFederation(members, trainer=None)  # type: ignore[arg-type]
    began = time.process_time()
    space = discover(federation, settings, seed)
    seconds = time.process_time() - began
    assignments = federation.assign(space)
    clusters = describe(assignments, max(space.cluster_of) + 1, RoutingSettings())
    radii = np.array([max(c.radius, 1e-9) for c in clusters])
    # Clients do not tell of labels that few rows carry; here we know them.
    counts = [
        Counter(str(m._tasks[i]) for m in members for i in m._rows.get(k, ())) for k in range(len(clusters))
    ]
    names = np.array([max(c, key=lambda t: (c[t], t), default="") for c in counts])
    rows = sum(c.total() for c in counts)
    tasks, weights = np.array([r.task for r in judged]), task_weights(judged)

    def route(vectors: Array) -> tuple[np.ndarray, np.ndarray]:
        centroid, distance = nearest(vectors, space)
        cluster = np.asarray(space.cluster_of)[centroid]
        return cluster, distance / radii[cluster]

    cluster, far = route(embedder.prompts(judged))
    right = names[cluster] == tasks
    beyond = {task: route(vectors)[1] for task, vectors in strange.items()}
    aurocs = {task: auroc(far, weights, other) for task, other in beyond.items()}
    return {
        "num_clusters": len(clusters),
        "found": len(clusters) == len(set(tasks)) == len(set(names)),
        "accuracy": float(right @ weights),
        "by_task": {str(t): float(right[tasks == t].mean()) for t in sorted(set(tasks))},
        "strayed": 1 - sum(max(c.values(), default=0) for c in counts) / rows,
        "rejected": float((far > 1) @ weights),
        "auroc": float(np.mean(list(aurocs.values()))) if aurocs else None,
        "auroc_by_task": aurocs,
        "seconds": seconds,
        "confusion": {t: dict(Counter(map(str, names[cluster[tasks == t]]))) for t in sorted(set(tasks))},
        "drawn": {"far": far, "strange": np.concatenate([*beyond.values(), []]), "space": space,
                  "right": right, "weights": weights, "clusters": clusters},
    }  # fmt: skip


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument(
        "--first", type=int, default=100, help="the first seed; those below 50 chose the defaults"
    )
    parser.add_argument("--part", choices=("test", "validation"), default="test")
    parser.add_argument("--only", nargs="*", help="embedders by name")
    parser.add_argument("--shapes", nargs="+", help="only federations of other shapes: parts of their names")
    parser.add_argument("--cache", type=Path, help="directory that keeps vectors across runs")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    more: list[dict[str, Any]] = []
    target = ROOT / "benchmarks" / "results"
    for name, embedder in embedders(options.only, options.cache).items():
        for data, (train, test) in data_sets(options.part).items():
            if name == "builtin:tiny" and data == "real":
                continue  # its vocabulary is the built-in tasks'
            four = TASKS if data == "built-in" else tuple(train)
            if options.shapes:
                more += routing_more.federations(
                    one, embedder, name, data, train, test, options.first, options.shapes
                )
                continue
            known = [r for task in four for r in test[task]] if test else None
            for shape in SCENARIOS:
                for seed in range(options.first, options.first + options.seeds):
                    clients, rest = deal(train, scenario(shape, four, 8, ROWS), seed)
                    judged = known or rest
                    near = {task: embedder.prompts(rows) for task, rows in unseen(judged).items()}
                    head = {"embedder": name, "data": data, "scenario": shape, "seed": seed}
                    for way, settings in WAYS.items():
                        if way != "fedrouter" and seed >= options.first + NUM_COMPARED:
                            continue
                        measured = one(embedder, settings, clients, judged, near, seed)
                        drawn = measured.pop("drawn")
                        results.append({"way": way, **head, **measured})
                        if way == "fedrouter" and shape == "dual" and seed == options.first:
                            stem = f"routing-{name}-{data}".replace(":", "-")
                            pictures.draw(target, stem, embedder.prompts(judged), judged, measured, drawn)
                    if shape == "dual" and seed < options.first + NUM_COMPARED:
                        taken = [row for rows in clients.values() for row in rows]
                        results += rivals(embedder, taken, judged, near, head)
                print(f"{name}, {data}, {shape}: done", flush=True)
            more += routing_more.federations(one, embedder, name, data, train, test, options.first)
            more += routing_more.fifth_task(embedder, name, data, train, test, options.first)
        if name == "MiniLM" and not options.shapes:
            more += routing_more.costs(embedder, data_sets(options.part))
        embedder.keep()
    report(
        "routing_shapes" if options.shapes else "routing",
        {"part": options.part, "first_seed": options.first, "runs": results, "more": more},
        summary(results) + routing_more.summary(more),
    )


def rivals(
    embedder: Remembering,
    taken: Sequence[Record],
    judged: Sequence[Record],
    strange: dict[str, Array],
    head: dict[str, Any],
) -> list[dict[str, Any]]:
    """Run what a user would pick instead; it is asked one prompt at a time, so of fewer."""
    head = {**head, "scenario": "all rows in one place"}
    tasks = dict.fromkeys(r.task for r in judged)
    judged = [r for task in tasks for r in [r for r in judged if r.task == task][:JUDGED]]
    found = [{"way": "nearest rows", **head, "accuracy": nearest_rows(embedder, taken, judged)}]
    for label, num in (("all rows", None), ("10 rows a task", 10)):
        measured = semantic_router(embedder, taken, judged, strange, num)
        if measured is None:
            break
        way = f"semantic-router, {label}"
        found.append({"way": way, **head, "accuracy": measured[0], "auroc": measured[1]})
    return found


def summary(results: list[dict[str, Any]]) -> list[tuple[str, str, str, bool | None]]:
    """Lines for each way, embedder, data and scenario: mean ± standard deviation over seeds."""
    rows: list[tuple[str, str, str, bool | None]] = []
    groups = defaultdict(list)
    for run in results:
        groups[run["way"], run["embedder"], run["data"], run["scenario"]].append(run)
    for (way, embedder, data, shape), runs in groups.items():
        accuracy = np.array([run["accuracy"] for run in runs])
        label = f"{way}, {embedder}, {data}, {shape}"
        shown = f"{accuracy.mean():.4f} ± {accuracy.std():.4f}"
        if way != "fedrouter":
            rows.append((f"{label}: accuracy", shown, "", None))
            if all(run.get("auroc") is not None for run in runs):
                rows.append(("  AUROC, unseen tasks", f"{np.mean([r['auroc'] for r in runs]):.3f}", "", None))
            continue
        if data == "built-in":
            wanted = 0.995
        else:
            wanted = 0.97 if embedder == "MiniLM" else 0.985 if shape == "all" else 0.99
        lowest = min(min(run["by_task"].values()) for run in runs)
        found = np.mean([run["found"] for run in runs])
        rejected = np.mean([run["rejected"] for run in runs])
        aurocs = np.array([run["auroc"] for run in runs])
        strayed = max(run["strayed"] for run in runs)
        rows += [
            (f"{label}, {len(runs)} seeds: accuracy", shown, f"≥ {wanted}", bool(accuracy.mean() >= wanted)),
            ("  lowest task, any seed", f"{lowest:.4f}", "≥ 0.97", lowest >= 0.97),
            ("  4 task clusters found", f"{found:.0%}", "≥ 90%", bool(found >= 0.9)),
            ("  rows astray, worst seed", f"{strayed:.2%}", "≤ 2%", strayed <= 0.02),
            ("  rejected (3% stated)", f"{rejected:.2%}", "1% to 5%", bool(0.01 <= rejected <= 0.05)),
            ("  AUROC, unseen tasks", f"{aurocs.mean():.3f} ± {aurocs.std():.3f}", "≥ 0.97",
             bool(aurocs.mean() >= 0.97)),
        ]  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
