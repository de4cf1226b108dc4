"""The paper's method beside its baselines: the same loop, data, steps and seed, judged on the same test rows.

python benchmarks/methods.py [--seed 1] [--out DIR] [METHOD …]

The federation is ``examples/four_tasks.toml``, 8 clients of two tasks each, cut to 3 rounds of 12 steps of 4
rows. An adapter is judged by its loss on the completions of test rows, nats a token, the mean over tasks:

- ``global``: a prompt goes to the nearest of all task clusters, whoever asks;
- ``local``: it goes to the nearest of those that the asking client has rows of; clients ask for their tasks.

Nothing was chosen on these test rows. ``fedprox`` takes μ = 0.1, the rest their defaults; prompts beyond
every radius go to the nearest adapter, so that no method is helped by the base. With ``--out`` the runs are
kept and gone on with.
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
from fedrouter.config import Config, LoraSettings, load_config
from fedrouter.data import load_records
from fedrouter.embed import routing_text
from fedrouter.models import load_base, load_tokenizer
from fedrouter.route import Router
from fedrouter.train.run import load_clients, train
from fedrouter.train.sft import AdapterTrainer
from fedrouter.types import Record

METHODS = ("fedrouter", "fedavg", "fedprox", "local", "clustered", "feddpa", "oracle")
OWN = {"fedprox": ["train.proximal=0.1"]}
SETTINGS = ["train.rounds=3", "train.steps=12", "train.batch_size=4", "routing.fallback=nearest"]
PER_TASK = 60  # test rows


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", default=METHODS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    scratch = tempfile.TemporaryDirectory()
    out = options.out or Path(scratch.name)
    for method in options.methods:
        file = out / f"{method}-{options.seed}.json"
        if not file.exists():
            config = load_config(
                ROOT / "examples" / "four_tasks.toml",
                [f"method={method}", f"seed={options.seed}", *SETTINGS, *OWN.get(method, [])],
            )
            bundle = train(config, out / f"{method}-{options.seed}", Console(width=110))
            file.write_text(json.dumps(judge(bundle, config)))
    found = {m: json.loads((out / f"{m}-{options.seed}.json").read_text()) for m in options.methods}
    if set(METHODS) <= set(found):
        show(found, options.seed)


def judge(bundle: Bundle, config: Config) -> dict[str, Any]:
    """Return the losses by mode and task of one method's bundle."""
    tests = test_rows()
    embedder, path = find_embedder(bundle, find_base(bundle)), find_base(bundle)
    lora = LoraSettings(rank=bundle.rank, alpha=config.lora.alpha * bundle.rank // config.lora.rank)
    trainer = AdapterTrainer(
        load_base(path, "float32", "cpu"), load_tokenizer(path), lora, config.train, config.seed
    )
    vectors = {t: embedder.embed([routing_text(r.turns) for r in rows]) for t, rows in tests.items()}
    asked: dict[str, list[tuple[str, str, int]]] = defaultdict(list)  # adapter → (mode, task, row)
    holders = {c: sorted({r.task for r in rows if r.task}) for c, rows in load_clients(config).items()}
    for client in (None, *holders):
        router = Router(bundle, client=client)
        for task in tests if client is None else holders[client]:
            for row, decision in enumerate(router.route(vectors[task])):
                asked[decision.model].append(("local" if client else "global", task, row))
    losses: dict[str, dict[str, list[float]]] = {m: defaultdict(list) for m in ("global", "local")}
    for name, rows in asked.items():
        adapter = load_file(bundle.adapter_paths[name] / "adapter_model.safetensors")
        done: dict[tuple[str, int], float] = {}
        for mode, task, row in rows:
            if (task, row) not in done:
                done[task, row] = trainer.loss(adapter, trainer.tokenise([tests[task][row]]))[0]
            losses[mode][task].append(done[task, row])
    return {
        "adapters": len(bundle.clusters),
        **{mode: {t: float(np.mean(own)) for t, own in sorted(by.items())} for mode, by in losses.items()},
    }


def test_rows() -> dict[str, list[Record]]:
    """Return test records by task."""
    files = sorted((SHARED / "data" / "four_tasks").glob("*.test.jsonl"))
    return {f.name.split(".")[0]: load_records(str(f), limit=PER_TASK) for f in files}


def show(found: dict[str, Any], seed: int) -> None:
    """Print and keep the comparison."""
    rows: list[tuple[str, str, str, bool | None]] = []
    means = {
        m: {mode: float(np.mean(list(one[mode].values()))) for mode in ("global", "local")}
        for m, one in found.items()
    }
    for method in METHODS:
        for mode in ("global", "local"):
            tasks = ", ".join(f"{loss:.3f}" for loss in found[method][mode].values())
            rows.append(
                (f"{method}, {mode}: {found[method]['adapters']} adapters ({tasks})",
                 f"{means[method][mode]:.3f}", "", None)
            )  # fmt: skip
    best = min(means[m]["global"] for m in METHODS if m not in ("fedrouter", "oracle"))
    ours = means["fedrouter"]["global"]
    rows.append(
        (
            "fedrouter ÷ best baseline that is not told the task, global",
            f"{ours / best:.3f}",
            "< 1",
            ours < best,
        )
    )
    report("methods", {"seed": seed, "tasks": list(found["fedrouter"]["global"]), "loss": found}, rows)


if __name__ == "__main__":
    main()
