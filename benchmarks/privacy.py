"""Cost of noise on centroids: routing accuracy of the paper's clustering by noise and rows per client.

The built-in tasks, eight clients with two tasks each, embedder builtin:tiny. Rows are clipped at the 95 %
quantile of the extra tasks' rows, which no client has. No labels are revealed with noise, so accuracy counts
a task cluster as being of the task that most test rows in it have.
"""

import argparse

import numpy as np
from common import report
from routing_data import Remembering

from fedrouter.builtin.tasks import EXTRA_TASKS, TASKS, generate
from fedrouter.config import Config
from fedrouter.embed import embedder_spec, load_embedder, probe, routing_text
from fedrouter.partition import partition
from fedrouter.train.client.client import Client
from fedrouter.train.local import LocalFederation
from fedrouter.train.server.accountant import guarantees
from fedrouter.train.server.describe import describe
from fedrouter.train.server.discover import discover
from fedrouter.train.space import nearest
from fedrouter.types import BaseSpec, Record

MULTIPLIERS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
DELTA = 1e-6


def one(
    embedder: Remembering,
    rows: dict[str, list[Record]],
    judged: list[Record],
    z: float,
    clip: float,
    seed: int,
) -> tuple[float, float]:
    """Cluster one federation; return accuracy and ε per row."""
    noise = {"centroid_noise": z, "clip_embeddings": clip, "delta": DELTA} if z else {}
    clusters = {"method": "kmeans", "local": 2, "global": 4}
    config = Config.model_validate({"cluster": clusters, "privacy": noise})
    clients = [Client(n, r, embedder, seed, config.privacy, bytes([seed])) for n, r in rows.items()]
    federation = LocalFederation(clients, trainer=None)  # type: ignore[arg-type]
    space = discover(federation, config.cluster, seed)
    assignments = federation.assign(space)
    assert describe(assignments, len(set(space.cluster_of)), config.routing)
    found = nearest(embedder.embed([routing_text(r.turns) for r in judged]), space)[0]
    tasks = np.array([r.task for r in judged])
    right = sum(max(((found == k) & (tasks == t)).sum() for t in TASKS) for k in np.unique(found))
    epsilon = guarantees(config, assignments)[0].epsilon if z else float("inf")
    return right / len(judged), epsilon


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[300, 1200, 2400], help="rows per client")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    spec = embedder_spec("base", "builtin:tiny", 512, "float32")
    embedder = Remembering(load_embedder(spec, BaseSpec("builtin:tiny", None, "")), None)
    public = embedder.embed(
        [routing_text(r.turns) for t in EXTRA_TASKS for r in generate(t, "train", 100, 0)]
    )
    clip = float(np.quantile(np.linalg.norm(public - probe(embedder).mean(0), axis=1), 0.95))
    judged = [r for t in TASKS for r in generate(t, "test", 150, 1)]
    results = []
    rows: list[tuple[str, str, str, bool | None]] = []
    for num in options.rows:
        for z in MULTIPLIERS:
            runs = []
            for seed in range(options.seeds):
                records = [r for t in TASKS for r in generate(t, "train", 2 * num, seed)]
                runs.append(one(embedder, partition(records, "dual", 8, seed), judged, z, clip, seed))
            accuracy, epsilon = np.mean([a for a, _ in runs]), runs[0][1]
            results.append({"rows": num, "noise": z, "epsilon": epsilon if z else None, "accuracy": accuracy})
            label = f"{num} rows per client, centroid_noise {z:g}, ε " + (f"{epsilon:.3g}" if z else "none")
            rows.append((label, f"{accuracy:.3f}", "", None))
            print(*rows[-1][:2], flush=True)
    report("privacy", {"clip": clip, "delta": DELTA, "runs": results}, rows)


if __name__ == "__main__":
    main()
