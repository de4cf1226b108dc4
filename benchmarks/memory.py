"""Peak memory of training with 64 clients against 8: one base model in memory, however many clients.

Each run is a process of its own; the operating system says what its peak was.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import report

CHILD = """
import resource, sys
from pathlib import Path
from rich.console import Console
from fedrouter.config import load_config
from fedrouter.train.run import train
clients = sys.argv[1]
settings = [f"data.num_clients={clients}", "data.num_per_task=1600", "train.rounds=1", "train.steps=4"]
config = load_config(None, settings)
train(config, Path(sys.argv[2]), Console(file=sys.stderr))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_mib(clients: int) -> float:
    """Return the peak resident memory of one training run, MiB; the same rows, dealt to ``clients``."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-c", CHILD, str(clients), str(Path(scratch) / "run")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.split()[-1])) / 1024


def main() -> None:
    """Measure and report."""
    peaks = {clients: peak_mib(clients) for clients in (8, 64)}
    ratio = peaks[64] / peaks[8]
    rows = [(f"peak MiB, {n} clients", f"{peak:.0f}", "", None) for n, peak in peaks.items()]
    rows.append(("64 ÷ 8", f"{ratio:.3f}", "≤ 1.2", ratio <= 1.2))
    report(
        "memory", {"peak_mib": {str(k): round(v) for k, v in peaks.items()}, "ratio": round(ratio, 4)}, rows
    )


if __name__ == "__main__":
    main()
