"""What a federation costs over plain training: seconds and memory, with the same base, data and steps.

python benchmarks/training.py

Three processes, one after another: one plain TRL ``SFTTrainer`` on all rows, a federation of 8 clients, one
of 64. Seconds are those of one whole round (the second: training, averaging, checkpoint), against as many
steps of the plain trainer; memory is the peak that the operating system saw. The base is
``../shared/models/english-6m`` where it is, else ``builtin:tiny``.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import SHARED, report
from rich.console import Console

BASE = SHARED / "models" / "english-6m"
STEPS = 128  # a round, over all clients
TRAINERS = 16  # that 8 clients with two tasks each start in a round


def main() -> None:
    """Measure and report."""
    if not BASE.exists():
        print("../shared/models/english-6m is absent: measured on builtin:tiny")
    plain, eight, sixty_four = (child(clients) for clients in (0, 8, 64))
    ratio = eight["seconds"] / plain["seconds"]
    setup = (eight["seconds"] - plain["seconds"]) / TRAINERS
    memory = eight["peak_mib"] / plain["peak_mib"]
    growth = sixty_four["peak_mib"] / eight["peak_mib"]
    rows = [
        (f"{STEPS} steps of one SFTTrainer, seconds", f"{plain['seconds']:.1f}", "", None),
        ("one round of 8 clients, seconds", f"{eight['seconds']:.1f}", "", None),
        ("8 clients ÷ plain, seconds", f"{ratio:.3f}", "≤ 1.15", ratio <= 1.15),
        ("the difference for each client and task, seconds", f"{setup:.3f}", "≤ 0.15", setup <= 0.15),
        ("peak MiB: plain", f"{plain['peak_mib']:.0f}", "", None),
        ("peak MiB: 8 clients", f"{eight['peak_mib']:.0f}", "", None),
        ("peak MiB: 64 clients", f"{sixty_four['peak_mib']:.0f}", "", None),
        ("8 clients ÷ plain, memory", f"{memory:.3f}", "≤ 1.3", memory <= 1.3),
        ("64 ÷ 8 clients, memory", f"{growth:.3f}", "≤ 1.1", growth <= 1.1),
    ]
    results = {"plain": plain, "8": eight, "64": sixty_four, "seconds_ratio": ratio, "setup_seconds": setup}
    results |= {"memory_ratio": memory, "memory_growth": growth}
    report("training", {"base": BASE.name if BASE.exists() else "builtin:tiny", **results}, rows)


def child(clients: int) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, str(clients)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(clients: int) -> dict[str, float]:
    """Train a federation, or plainly for 0 clients; return seconds and peak memory."""
    from fedrouter.config import load_config

    settings = [f"base.model={BASE}"] if BASE.exists() else []
    settings += [
        f"data.num_clients={clients or 8}",
        "data.num_per_task=400",
        f"train.rounds={2 if clients == 8 else 1}",
        f"train.steps={STEPS // (clients or 1)}",
    ]
    config = load_config(None, settings)
    seconds = federated(config) if clients else plainly(config)
    return {
        "seconds": round(seconds, 2),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def federated(config: Any) -> float:
    """Return the seconds of the last round; 0 if there is only one."""
    from fedrouter.train.run import train

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        train(config, out, Console(file=sys.stderr))
        stamps = [json.loads(line)["time"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    return float(max(stamps) - min(stamps))


def plainly(config: Any) -> float:
    """Return the seconds of one SFTTrainer over all clients' rows."""
    from fedrouter.models import load_base, load_tokenizer, resolve_base
    from fedrouter.train.run import load_clients
    from fedrouter.train.sft import AdapterTrainer

    path = resolve_base(config.base.model)
    trainer = AdapterTrainer(
        load_base(path, "float32", "cpu"), load_tokenizer(path), config.lora, config.train, config.seed
    )
    data = trainer.tokenise([record for rows in load_clients(config).values() for record in rows])
    began = time.perf_counter()
    trainer.train(trainer.state(), data, STEPS, config.train.learning_rate, config.seed)
    return time.perf_counter() - began


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(int(sys.argv[1]))))
    else:
        main()
