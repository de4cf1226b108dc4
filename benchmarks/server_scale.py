"""Cost of global clustering on the server with thousands of clients: seconds, peak memory, and their growth.

python benchmarks/server_scale.py [CLIENTS …]

Each number of clients and each method runs in a new process: 4 centroids per client, 384 dimensions. Clients
are created when they are needed and then discarded; their seconds are subtracted, because in a federation
they compute on other machines. Seconds are CPU seconds of one thread, so that a busy machine does not change
them. ``tree`` is the exchange of discover.py, ``kmeans`` the paper's method. Growth is the slope of log
seconds over log clients.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from common import report

from fedrouter.config import ClusterSettings, Config
from fedrouter.train.client import cluster
from fedrouter.train.server.describe import describe
from fedrouter.train.server.discover import discover
from fedrouter.types import Array, Assignment, LocalClusters, RoutingSpace

CLIENTS = (1_000, 2_500, 5_000, 10_000)
DIM, LOCAL, ROWS, TASKS = 384, 4, 60, 8  # a client has two tasks, each in two local clusters
SETTINGS = {
    "tree": ClusterSettings(),
    "kmeans": ClusterSettings.model_validate({"method": "kmeans", "local": LOCAL, "global": TASKS}),
}


class Crowd:
    """Any number of clients, each generated from its number when it is needed."""

    def __init__(self, num: int):
        self.num, self.seconds = num, 0.0
        centre = np.random.default_rng(0)
        self.prompts = centre.normal(size=(TASKS, DIM)) * 1.5

    def summarise(self, _num: object) -> Iterator[LocalClusters]:
        """Yield local clusters like those of k-means: each of the two tasks in two halves."""
        quarters = np.arange(ROWS) % LOCAL
        return self._each(lambda _name, x: cluster.gather(x.astype(np.float64), quarters, LOCAL))

    def assign(self, space: RoutingSpace) -> Iterator[Assignment]:
        """Yield rows by task cluster."""
        tasks = [None] * ROWS
        return self._each(lambda name, x: Assignment(name, cluster.assign(x, space, tasks)[1]))

    def _each(self, reveal: Callable[[str, Array], Any]) -> Iterator[Any]:
        for number in range(self.num):
            began = time.process_time()
            rng = np.random.default_rng(number)
            tasks = np.array([number % TASKS, (number + 1 + number // TASKS % (TASKS - 1)) % TASKS])
            task_of_row = tasks[np.arange(ROWS) % 2]
            x = (self.prompts[task_of_row] + rng.normal(size=(ROWS, DIM))).astype(np.float32)
            revealed = reveal(f"client-{number}", x)
            self.seconds += time.process_time() - began
            yield revealed


def main() -> None:
    """Measure and report."""
    sizes = tuple(int(text) for text in sys.argv[1:]) or CLIENTS
    rows: list[tuple[str, str, str, bool | None]] = []
    results: dict[str, Any] = {}
    for method in SETTINGS:
        found = {num: child(method, num) for num in sizes}
        for num, result in found.items():
            judged = num == 10_000
            seconds, peak = result["seconds"], result["peak_mib"]
            label = f"{method}, {num:,} clients × {LOCAL}"
            rows.append((f"{label}: seconds", f"{seconds:.1f}", "≤ 30" if judged else "",
                         seconds <= 30 if judged else None))  # fmt: skip
            rows.append((f"{label}: peak MiB", f"{peak:.0f}", "< 1907 (2 GB)" if judged else "",
                         peak < 2e9 / 2**20 if judged else None))  # fmt: skip
            rows.append((f"{label}: task clusters", f"{result['clusters']:.0f}", f"{TASKS}",
                         result["clusters"] == TASKS))  # fmt: skip
        times = [found[num]["seconds"] for num in sizes]
        growth = float(np.polyfit(np.log(sizes), np.log(times), 1)[0]) if len(sizes) > 1 else float("nan")
        rows.append((f"{method}: seconds grow as clients to the power", f"{growth:.2f}", "≤ 1.2",
                     growth <= 1.2))  # fmt: skip
        results[method] = {"growth": round(growth, 3), **{str(num): row for num, row in found.items()}}
    report("server_scale", results, rows)


def child(method: str, num: int) -> dict[str, float]:
    """Measure in a new process."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", method, str(num)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(method: str, num: int) -> dict[str, float]:
    """Cluster ``num`` clients and calibrate the radii; return the server's seconds and the peak memory."""
    crowd = Crowd(num)
    began = time.process_time()
    space = discover(crowd, SETTINGS[method], seed=0)
    clusters = describe(list(crowd.assign(space)), len(set(space.cluster_of)), Config().routing)
    total = time.process_time() - began
    return {
        "seconds": round(total - crowd.seconds, 2),
        "clients_seconds": round(crowd.seconds, 1),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "clusters": len(clusters),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
    else:
        main()
