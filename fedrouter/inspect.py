"""Show what is in a run or a bundle: the people's view of config, metrics and manifest."""

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedrouter.bundle import Bundle, load_bundle
from fedrouter.errors import DataError

BLOCKS = "▁▂▃▄▅▆▇█"


def show(path: Path, console: Console) -> None:
    """Print a run's progress and its bundle, or a bundle alone.

    Raises
    ------
    DataError
        If ``path`` is neither.
    """
    if (path / "manifest.json").exists():
        _show_bundle(load_bundle(path), console)
    elif (path / "config.json").exists():
        _show_run(path, console)
    else:
        raise DataError(f"{path}: neither a run (config.json) nor a bundle (manifest.json)")


def _show_run(path: Path, console: Console) -> None:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    metrics = path / "metrics.jsonl"
    told = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    lines = [line for line in told if "cluster" in line]
    done = max((line["round"] + 1 for line in lines), default=0)
    console.print(f"run {path}: {done} of {config['train']['rounds']} rounds, base {config['base']['model']}")
    joined = path / "joined.json"
    for one in json.loads(joined.read_text(encoding="utf-8")) if joined.exists() else []:
        moved = [f"{name} (moved)" for name in one.get("moved", {})]
        names = ", ".join([*one["clients"], *moved])
        console.print(f"joined {one['run']}: {names}", highlight=False, soft_wrap=True)
    for client, reason in (pair for line in told for pair in line.get("left_out", {}).items()):
        console.print(f"left out {client}: {reason}", highlight=False, soft_wrap=True, markup=False)
    if lines:
        table = Table(
            "task cluster", "loss by round", "first", "last", "examples", "clients", title="training"
        )
        trained = [line for line in lines if line["loss"] is not None]  # null: no update could be used
        for name in sorted({line["cluster"] for line in trained}):
            own = [line for line in trained if line["cluster"] == name]
            losses = [line["loss"] for line in own]
            examples = sum(line["num_examples"] for line in own)
            table.add_row(
                name,
                spark(losses),
                f"{losses[0]:.3f}",
                f"{losses[-1]:.3f}",
                str(examples),
                str(own[-1]["num_clients"]),
            )
        console.print(table)
    if (path / "bundle").exists():
        _show_bundle(load_bundle(path / "bundle"), console)
    else:
        console.print(
            f"no bundle yet; give the same {'join' if joined.exists() else 'train'} command again to go on"
        )


def _show_bundle(bundle: Bundle, console: Console) -> None:
    console.print(f"bundle {escape(str(bundle.path))}", soft_wrap=True)
    console.print(f"base {escape(bundle.base.model)}, rank {bundle.rank}, fallback {bundle.fallback}")
    console.print(
        f"embedder {bundle.embedder.kind} {escape(bundle.embedder.model)}, {bundle.embedder.dim} dimensions"
    )
    table = Table(
        "task cluster", "adapter", "rows", "clients", "radius", "tasks of its rows", title="task clusters"
    )
    for c in bundle.clusters:
        tasks = ", ".join(f"{escape(task)} {count}" for task, count in c.task_counts.items()) or "no labels"
        table.add_row(c.name, c.adapter, str(c.num_examples), str(len(c.clients)), f"{c.radius:.2f}", tasks)
    console.print(table)
    if bundle.generalist:
        console.print(f"generalist {bundle.generalist}: for prompts of no task cluster", soft_wrap=True)
    for guarantee in bundle.guarantees:
        console.print(f"privacy: {guarantee}", highlight=False, soft_wrap=True, markup=False)


def spark(values: list[float]) -> str:
    """Draw a series as a line of blocks."""
    low, high = min(values), max(values)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in values)
