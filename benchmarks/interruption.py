"""Twenty runs killed at random moments, started again, compared byte for byte with one left alone.

python benchmarks/interruption.py [--kills 20] [--seed 0]

Each run is killed with SIGKILL at a uniformly drawn moment of the uninterrupted run's duration (and so also
while it loads, embeds, clusters, writes a checkpoint or the bundle), then the same command is given again.
The run has all that outlives a round: a server optimizer, best rounds by validation, clustering anew.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import report

from fedrouter.builtin.tasks import TASKS, generate

SETTINGS = [
    "cluster.every=2",
    "train.rounds=6",
    "train.steps=4",
    "train.batch_size=4",
    "train.validation=0.1",
    "aggregate.server=momentum",
    "aggregate.server_learning_rate=0.7",
]
CLIENTS = {"a": (0, 1), "b": (1, 2), "c": (2, 3), "d": (3, 0)}  # numbers of their tasks


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch))
        whole = Path(scratch) / "whole"
        began = time.perf_counter()
        subprocess.run(command(whole), check=True, stdout=subprocess.DEVNULL)
        duration = time.perf_counter() - began
        wanted = content(whole / "bundle")
        identical, moments = 0, []
        for number in range(options.kills):
            out = Path(scratch) / f"killed-{number}"
            moments.append(rng.uniform(0, duration))
            kill_after(command(out), moments[-1])
            done = [p.name for p in (out / "checkpoints").glob("round-*")] if out.exists() else []
            subprocess.run(command(out), check=True, stdout=subprocess.DEVNULL)
            same = content(out / "bundle") == wanted
            identical += same
            verdict = "same" if same else "OTHER"
            print(f"killed after {moments[-1]:.1f} s with {len(done)} checkpoints: {verdict}")
    rows = [
        ("seconds of the run left alone", f"{duration:.1f}", "", None),
        ("identical bundles", f"{identical} of {options.kills}", "all", identical == options.kills),
    ]
    results = {"identical": identical, "kills": options.kills, "seconds": round(duration, 1)}
    report("interruption", {**results, "moments": [round(m, 2) for m in moments]}, rows)


def prepare(directory: Path) -> None:
    """Write every client's file and a configuration that names them."""
    for client, tasks in CLIENTS.items():
        records = [r for t in tasks for r in generate(TASKS[t], "train", 40, ord(client))]
        rows = [{"prompt": r.turns[-1].content, "completion": r.completion, "task": r.task} for r in records]
        (directory / f"{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    clients = ", ".join(f'{c} = "{c}.jsonl"' for c in CLIENTS)
    (directory / "run.toml").write_text(f"[data]\nclients = {{ {clients} }}\n")


def command(out: Path) -> list[str]:
    """Return the command line of a run."""
    overrides = [part for setting in SETTINGS for part in ("--set", setting)]
    train = [sys.executable, "-m", "fedrouter", "train", str(out.parent / "run.toml")]
    return [*train, "--out", str(out), *overrides]


def kill_after(arguments: list[str], seconds: float) -> None:
    """Start a command and kill it with SIGKILL, unless it ends before."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def content(bundle: Path) -> dict[str, bytes]:
    """Return every file's bytes."""
    return {str(p.relative_to(bundle)): p.read_bytes() for p in sorted(bundle.rglob("*")) if p.is_file()}


if __name__ == "__main__":
    main()
