"""Twenty runs killed at random times, restarted, and compared byte for byte with an uninterrupted run.

python benchmarks/interruption.py [--kills 20] [--seed 0]

Each run is a process that is killed with SIGKILL at a uniformly random time of the uninterrupted run's
duration, so also while it loads, embeds, clusters, or writes a checkpoint or the bundle; then the same run is
started again. The settings use all state that outlives a round: a server optimizer, best rounds by
validation, repeated clustering. Processes are forked after their imports, because most kills would otherwise
hit the imports.
"""

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from pathlib import Path

from common import report
from rich.console import Console

from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.config_file import load_config
from fedrouter.train.run import train

ROUNDS = 4
SETTINGS = [
    "cluster.every=2",
    f"train.rounds={ROUNDS}",
    "train.steps=4",
    "train.batch_size=4",
    "train.validation=0.1",
    "aggregate.server=momentum",
    "aggregate.server_learning_rate=0.7",
]
CLIENTS = {"a": (0, 1), "b": (1, 2), "c": (2, 0)}  # numbers of their tasks


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["fedrouter.train.run"])
    identical, moments, checkpoints = 0, [], []
    with tempfile.TemporaryDirectory() as scratch:
        config = prepare(Path(scratch))

        def start(out: Path) -> multiprocessing.process.BaseProcess:
            process = processes.Process(target=run, args=(config, out))
            process.start()
            return process

        for name in ("warm", "whole"):
            began = time.perf_counter()
            start(Path(scratch) / name).join()
            duration = time.perf_counter() - began
        wanted = content(Path(scratch) / "whole" / "bundle")
        for number in range(options.kills):
            out = Path(scratch) / f"killed-{number}"
            moments.append(rng.uniform(0, duration))
            process = start(out)
            process.join(moments[-1])
            process.kill()
            process.join()
            done = sorted(p.name for p in (out / "checkpoints").glob("round-*")) if out.exists() else []
            checkpoints.append(int(done[-1].split("-")[1]) + 1 if done else 0)
            ended = (out / "bundle").exists()
            start(out).join()
            same = content(out / "bundle") == wanted
            identical += same
            where = "after the end of the run" if ended else f"after {checkpoints[-1]} rounds"
            print(f"killed at {moments[-1]:.1f} s, {where}: {'same' if same else 'OTHER'}", flush=True)
    between = f"{sum(n == 0 for n in checkpoints)}, {sum(0 < n < ROUNDS for n in checkpoints)}, "
    rows = [
        ("seconds of the uninterrupted run", f"{duration:.1f}", "", None),
        ("killed before the first round's end, between, after the last",
         between + str(sum(n == ROUNDS for n in checkpoints)), "", None),
        ("identical bundles", f"{identical} of {options.kills}", "all", identical == options.kills),
    ]  # fmt: skip
    results = {"identical": identical, "kills": options.kills, "seconds": round(duration, 1)}
    results |= {"moments": [round(m, 2) for m in moments], "rounds_done": checkpoints}
    report("interruption", results, rows)


def prepare(directory: Path) -> Path:
    """Write each client's file and a configuration; return the configuration's path."""
    for client, tasks in CLIENTS.items():
        records = [r for t in tasks for r in generate(TASKS[t], "train", 30, ord(client))]
        rows = [{"prompt": r.turns[-1].content, "completion": r.completion, "task": r.task} for r in records]
        (directory / f"{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    clients = ", ".join(f'{c} = "{c}.jsonl"' for c in CLIENTS)
    file = directory / "run.toml"
    file.write_text(f"[data]\nclients = {{ {clients} }}\n")
    return file


def run(file: Path, out: Path) -> None:
    """Train; the target of each process."""
    train(load_config(file, SETTINGS), out, Console(quiet=True))


def content(bundle: Path) -> dict[str, bytes]:
    """Return the content of every file of a bundle, by path."""
    return {str(p.relative_to(bundle)): p.read_bytes() for p in sorted(bundle.rglob("*")) if p.is_file()}


if __name__ == "__main__":
    main()
