"""Cost of a federation compared with plain training, in seconds and memory, with the same base and batches.

python benchmarks/training.py

Runs one process after another: a federation of 8 clients, one plain TRL ``SFTTrainer``, a federation of 64,
and one that repeatedly trains a client for few steps. Seconds are CPU seconds of one thread, which a busy
machine hardly changes; a federation's are of its whole second round: training, averaging, checkpoint. The
plain trainer gets exactly the batches of that round, and so the same padding: the difference is the cost of
the federation. Batches mixed over tasks have more padding and are timed as well. Wall-clock seconds are of
the same round, with all threads in one process and with parallel processes. Memory is the operating system's
peak value. The base is ``../shared/models/english-6m`` if it exists, else ``builtin:tiny``.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import SHARED, report
from rich.console import Console

BASE = SHARED / "models" / "english-6m"
STEPS = 128  # per round, over all clients
THREADS = min(4, os.cpu_count() or 1)
FEW, MANY = 1, 9  # steps; their difference separates a trainer's set-up from its steps


def main() -> None:
    """Measure and report."""
    if not BASE.exists():
        print("../shared/models/english-6m does not exist: measured with builtin:tiny")
    with tempfile.TemporaryDirectory() as scratch:
        batches = str(Path(scratch) / "batches.json")
        eight, plain, mixed = (child(mode, batches) for mode in ("8", "plain", "mixed"))
    sixty_four, setup = child("64"), child("setup")
    together, beside = child("threads"), child("processes")
    ratio = eight["seconds"] / plain["seconds"]
    memory = eight["peak_mib"] / plain["peak_mib"]
    growth = sixty_four["peak_mib"] / eight["peak_mib"]
    rows = [
        (f"{STEPS} steps of one SFTTrainer, seconds", f"{plain['seconds']:.1f}", "", None),
        ("the same in batches mixed over tasks, seconds", f"{mixed['seconds']:.1f}", "", None),
        ("one round of 8 clients, seconds", f"{eight['seconds']:.1f}", "", None),
        ("8 clients ÷ plain, seconds", f"{ratio:.3f}", "≤ 1.15", ratio <= 1.15),
        ("padded tokens: 8 clients, plain, mixed",
         ", ".join(f"{run['tokens']:,.0f}" for run in (eight, plain, mixed)), "the first two equal",
         eight["tokens"] == plain["tokens"]),
        ("set-up of a trainer, for each client, task and round, seconds", f"{setup['seconds']:.3f}", "≤ 0.15",
         setup["seconds"] <= 0.15),
        (f"one round, wall clock, {THREADS} threads, seconds", f"{together['seconds']:.1f}", "", None),
        (f"the same in {THREADS} processes of one thread, seconds", f"{beside['seconds']:.1f}", "", None),
        ("processes ÷ threads, seconds", f"{beside['seconds'] / together['seconds']:.3f}", "", None),
        ("peak MiB: plain", f"{plain['peak_mib']:.0f}", "", None),
        ("peak MiB: 8 clients", f"{eight['peak_mib']:.0f}", "", None),
        ("peak MiB: 64 clients", f"{sixty_four['peak_mib']:.0f}", "", None),
        ("8 clients ÷ plain, memory", f"{memory:.3f}", "≤ 1.3", memory <= 1.3),
        ("64 ÷ 8 clients, memory", f"{growth:.3f}", "≤ 1.1", growth <= 1.1),
    ]  # fmt: skip
    results = {"plain": plain, "mixed": mixed, "8": eight, "64": sixty_four, "seconds_ratio": ratio}
    results |= {"threads": together, "processes": beside}
    results |= {"setup_seconds": setup["seconds"], "memory_ratio": memory, "memory_growth": growth}
    report("training", {"base": BASE.name if BASE.exists() else "builtin:tiny", **results}, rows)


def child(*arguments: str) -> dict[str, float]:
    """Measure in a new process."""
    command = [sys.executable, __file__, *arguments]
    threads = THREADS if arguments[0] in ("threads", "processes") else 1
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(mode: str, file: Path | None = None) -> dict[str, float]:
    """Run one measurement; return seconds and peak memory.

    Parameters
    ----------
    mode : number of clients, or another of the modes in ``main``.
    file : where the batches of 8 clients are written, and read by "plain".
    """
    from fedrouter.config_file import load_config

    clients = int(mode) if mode.isdigit() else 8
    settings = [f"base.model={BASE}"] if BASE.exists() else []
    settings += [
        f"data.num_clients={clients}",
        "data.num_per_task=400",
        "train.schedule=all",  # both subsets in every round
        f"train.rounds={2 if mode in ('8', 'threads', 'processes') else 1}",
        f"train.steps={STEPS // clients}",
    ]
    config = load_config(None, settings)
    if mode.isdigit():
        found = federated(config, file)
    elif mode in ("threads", "processes"):
        found = {"seconds": clock_seconds(config, THREADS if mode == "processes" else 1)}
    elif mode == "setup":
        found = {"seconds": setup_seconds(config)}
    else:
        found = plainly(config, json.loads(file.read_text()) if file and mode == "plain" else None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**{k: round(v, 4) for k, v in found.items()}, "peak_mib": peak}


def federated(config: Any, file: Path | None) -> dict[str, float]:
    """Return the seconds and padded tokens of the last round; write its batches to ``file``."""
    from fedrouter.train import rounds
    from fedrouter.train.client import sft
    from fedrouter.train.disk.metrics import Metrics
    from fedrouter.train.run import train

    batches: list[list[list[list[int]]]] = []

    class Recording(sft._Trainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            if file:
                batches.append([inputs[k].tolist() for k in ("input_ids", "labels", "attention_mask")])
            return super().training_step(model, inputs, *rest)

    stamps = [0.0]

    class Stamping(Metrics):
        def write(self, *result: Any) -> None:
            super().write(*result)
            stamps.append(time.process_time())

    patched: tuple[Any, Any] = sft, rounds
    patched[0]._Trainer, patched[1].Metrics = Recording, Stamping
    with tempfile.TemporaryDirectory() as scratch:
        train(config, Path(scratch) / "run", Console(file=sys.stderr))
    if not file:
        return {}
    seconds = stamps[-1] - stamps[-2]
    assert len(batches) == 1 + 2 * STEPS, "the rehearsal, and two rounds"
    rows = []
    for ids, labels, masks in batches[-STEPS:]:
        assert len(ids) == config.train.batch_size, "a plain trainer could not make this batch"
        for row, row_labels, mask in zip(ids, labels, masks, strict=True):
            rows.append({"input_ids": row[: sum(mask)], "labels": row_labels[: sum(mask)]})
    file.write_text(json.dumps(rows))
    tokens = sum(len(ids) * len(ids[0]) for ids, _, _ in batches[-STEPS:])
    return {"seconds": seconds, "tokens": tokens}


def clock_seconds(config: Any, processes: int) -> float:
    """Return the wall-clock seconds of the last round with ``processes`` adapters trained in parallel."""
    from fedrouter.train.run import train

    with tempfile.TemporaryDirectory() as scratch:
        train(config, Path(scratch) / "run", Console(file=sys.stderr), processes)
        lines = (Path(scratch) / "run" / "metrics.jsonl").read_text().splitlines()
    ends = {line["round"]: line["time"] for line in map(json.loads, lines)}
    return float(ends[1] - ends[0])


def plainly(config: Any, rows: Any) -> dict[str, float]:
    """Return the seconds and padded tokens of one SFTTrainer over ``rows`` in order; None: all, shuffled."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from fedrouter.models import load_base, load_tokenizer, resolve_base
    from fedrouter.train.client.sft import tokenise
    from fedrouter.train.client.sources import load_clients

    path = resolve_base(config.base.model)
    base, tokenizer = load_base(path, "float32", "cpu"), load_tokenizer(path)
    if rows is None:
        records = [record for rows_of_client in load_clients(config).values() for record in rows_of_client]
        data = tokenise(records, tokenizer, config.train.max_length)
    else:
        data = Dataset.from_list(rows)
    tokens = 0

    class Counting(SFTTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            nonlocal tokens
            tokens += inputs["input_ids"].numel()
            return super().training_step(model, inputs, *rest)

    with tempfile.TemporaryDirectory() as scratch:
        began = time.process_time()
        Counting(
            model=base,
            args=SFTConfig(
                output_dir=scratch,
                max_steps=STEPS,
                per_device_train_batch_size=config.train.batch_size,
                train_sampling_strategy="random" if rows is None else "sequential",
                learning_rate=config.train.learning_rate,
                lr_scheduler_type="constant",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
                dataloader_pin_memory=False,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            peft_config=LoraConfig(
                r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules="all-linear"
            ),
            train_dataset=data,
            processing_class=tokenizer,
        ).train()
        return {"seconds": time.process_time() - began, "tokens": float(tokens)}


def setup_seconds(config: Any) -> float:
    """Return the median seconds of a client's training beyond its steps, on batches of one length."""
    from fedrouter.models import load_base, load_tokenizer, resolve_base
    from fedrouter.train.client.sft import AdapterTrainer
    from fedrouter.train.client.sources import load_clients

    path = resolve_base(config.base.model)
    trainer = AdapterTrainer(
        load_base(path, "float32", "cpu"), load_tokenizer(path), config.lora, config.train, config.seed
    )
    record = next(iter(load_clients(config).values()))[0]
    data, adapter = trainer.tokenise([record] * config.train.batch_size * MANY), trainer.state()

    def seconds(steps: int) -> float:
        began = time.process_time()
        trainer.train(adapter, data, steps, config.train.learning_rate, config.seed)
        return time.process_time() - began

    seconds(FEW)
    pairs = [(seconds(FEW), seconds(MANY)) for _ in range(10)]
    return statistics.median(few - FEW * (many - few) / (MANY - FEW) for few, many in pairs)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None)))
    else:
        main()
