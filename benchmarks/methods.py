"""The paper's method and its baselines with the same loop, data, steps and seeds, on the same test rows.

python benchmarks/methods.py [--seeds 1 2] [--out DIR] [METHOD …]

The federation is ``examples/four_tasks.toml``, 8 clients with two tasks each, shortened to 3 rounds of 12
steps of 4 rows. Adapters are compared by their loss on the completions of test rows, in nats per token,
averaged over tasks:

- ``global``: a prompt is routed among all task clusters;
- ``local``: it is routed among the task clusters with rows of the client; each client has its own tasks.

No setting was chosen on these test rows. ``fedprox`` uses μ = 0.1, the others their defaults. Prompts beyond
every radius are routed to the nearest adapter, so that no method benefits from the base. A seed determines
the clients' rows, initial adapters and batches. ``fedrouter-exact`` averages products; in ``fedrouter-all``
clients train all their subsets in every round. With ``--out`` runs are stored and can
be resumed.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, SHARED, report
from rich.console import Console
from safetensors.numpy import load_file

from fedrouter.bundle import Bundle, find_base, find_embedder
from fedrouter.config import Config, LoraSettings
from fedrouter.config_file import load_config
from fedrouter.data import load_records
from fedrouter.embed import routing_text
from fedrouter.models import load_base, load_tokenizer
from fedrouter.route import Router
from fedrouter.train.client.sft import AdapterTrainer
from fedrouter.train.client.sources import load_clients
from fedrouter.train.run import train
from fedrouter.types import Record

METHODS = ("fedrouter", "fedavg", "fedprox", "local", "clustered", "feddpa", "oracle")
VARIANTS = {"fedrouter-exact": ["aggregate.method=exact"], "fedrouter-all": ["train.schedule=all"]}
OWN = {"fedprox": ["train.proximal=0.1"], **VARIANTS}
SETTINGS = [
    "train.rounds=3",
    "train.steps=12",
    "train.batch_size=4",
    "routing.fallback=nearest",
]
PER_TASK = 60  # test rows
MODES = ("global", "local")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", default=[*METHODS, *VARIANTS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    scratch = tempfile.TemporaryDirectory()
    out = options.out or Path(scratch.name)
    files = {(seed, m): out / f"{m}-{seed}.json" for seed in options.seeds for m in options.methods}
    for (seed, method), file in files.items():
        if not file.exists():
            config = load_config(
                ROOT / "examples" / "four_tasks.toml",
                [f"method={method.partition('-')[0]}", f"seed={seed}", *SETTINGS, *OWN.get(method, [])],
            )
            bundle = train(config, file.with_suffix(""), Console(width=110))
            file.write_text(json.dumps(judge(bundle, config)))
    if set(METHODS) <= set(options.methods):
        show(
            {m: [json.loads(files[seed, m].read_text()) for seed in options.seeds] for m in options.methods},
            options,
        )


def judge(bundle: Bundle, config: Config) -> dict[str, Any]:
    """Return the losses of one method's bundle by mode and task."""
    tests = test_rows()
    embedder, path = find_embedder(bundle, find_base(bundle)), find_base(bundle)
    lora = LoraSettings(rank=bundle.rank, alpha=config.lora.alpha * bundle.rank // config.lora.rank)
    trainer = AdapterTrainer(
        load_base(path, "float32", "cpu"), load_tokenizer(path), lora, config.train, config.seed
    )
    vectors = {t: embedder.embed([routing_text(r.turns) for r in rows]) for t, rows in tests.items()}
    routed: dict[str, list[tuple[str, str, int]]] = defaultdict(list)  # adapter → (mode, task, row)
    tasks_of = {c: sorted({r.task for r in rows if r.task}) for c, rows in load_clients(config).items()}
    for client in (None, *tasks_of):
        router = Router(bundle, client=client)
        for task in tests if client is None else tasks_of[client]:
            for row, decision in enumerate(router.route(vectors[task])):
                routed[decision.model].append(("local" if client else "global", task, row))
    losses: dict[str, dict[str, list[float]]] = {m: defaultdict(list) for m in ("global", "local")}
    for name, rows in routed.items():
        adapter = load_file(bundle.adapter_paths[name] / "adapter_model.safetensors")
        done: dict[tuple[str, int], float] = {}
        for mode, task, row in rows:
            if (task, row) not in done:
                done[task, row] = trainer.loss(adapter, trainer.tokenise([tests[task][row]]))[0]
            losses[mode][task].append(done[task, row])
    return {
        "adapters": len(bundle.clusters),
        **{
            mode: {task: float(np.mean(values)) for task, values in sorted(by_task.items())}
            for mode, by_task in losses.items()
        },
    }


def test_rows() -> dict[str, list[Record]]:
    """Return test records by task."""
    files = sorted((SHARED / "data" / "four_tasks").glob("*.test.jsonl"))
    return {f.name.split(".")[0]: load_records(str(f))[:PER_TASK] for f in files}


def show(found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """Report the comparison; ``found`` has one result per seed for each method."""
    rows: list[tuple[str, str, str, bool | None]] = []
    means = {
        (method, mode): [float(np.mean(list(seed[mode].values()))) for seed in results]
        for method, results in found.items()
        for mode in MODES
    }
    by_task = {
        (method, mode, task): float(np.mean([seed[mode][task] for seed in results]))
        for method, results in found.items()
        for mode in MODES
        for task in results[0][mode]
    }
    tasks = list(found["fedrouter"][0]["global"])
    for method, results in found.items():
        adapters = "/".join(str(n) for n in dict.fromkeys(seed["adapters"] for seed in results))
        for mode in MODES:
            losses = ", ".join(f"{by_task[method, mode, task]:.3f}" for task in tasks)
            seeds = " ".join(f"{mean:.3f}" for mean in means[method, mode])
            label = f"{method}, {mode}: {adapters} adapters ({losses})"
            rows.append((label, f"{np.mean(means[method, mode]):.3f} ({seeds})", "", None))
    others = [m for m in METHODS if m not in ("fedrouter", "oracle")]
    for mode in MODES:
        ratios = [
            ours / min(means[m, mode][i] for m in others) for i, ours in enumerate(means["fedrouter", mode])
        ]
        label = f"fedrouter ÷ best baseline that does not know the tasks, {mode}, by seed"
        rows.append((label, " ".join(f"{r:.3f}" for r in ratios), "< 1", max(ratios) < 1))
        for task in tasks:
            lower = [m for m in others if by_task[m, mode, task] < by_task["fedrouter", mode, task]]
            if lower:
                rows.append((f"lower than fedrouter on {task}, {mode}", ", ".join(lower), "", None))
    report("methods", {"seeds": options.seeds, "tasks": tasks, "loss": found}, rows)


if __name__ == "__main__":
    main()
