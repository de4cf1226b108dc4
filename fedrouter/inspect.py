"""Contents of a run or a bundle, as JSON values or printed: configuration, metrics and manifest."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedrouter.bundle import Bundle, load_bundle
from fedrouter.config_file import read_resolved
from fedrouter.errors import DataError
from fedrouter.files import read_json, read_json_lines
from fedrouter.layout import Whole, print_line
from fedrouter.layout import show as show_whole

BLOCKS = "▁▂▃▄▅▆▇█"


def look(path: Path) -> dict[str, Any]:
    """Return the contents of a run (``run``, and ``bundle`` once it exists) or of a bundle (``bundle`` only).

    Raises
    ------
    DataError, ConfigError
        If ``path`` is neither, or a file is damaged.
    """
    if (path / "manifest.json").exists():
        return {"bundle": _bundle(load_bundle(path))}
    if not (path / "config.json").exists():
        raise DataError(f"{path}: neither a run (config.json) nor a bundle (manifest.json)")
    metrics = read_metrics(path)
    joined = path / "joined.json"
    run = {
        "path": str(path),
        "config": read_resolved(path / "config.json").model_dump(mode="json", by_alias=True),
        "num_rounds": max((line["round"] + 1 for line in metrics if "cluster" in line), default=0),
        "joined": read_json(joined) if joined.exists() else [],
        "left_out": {client: why for line in metrics for client, why in line.get("left_out", {}).items()},
        "rounds": [line for line in metrics if "cluster" in line],
    }
    has_bundle = (path / "bundle").exists()
    return {"run": run, **({"bundle": _bundle(load_bundle(path / "bundle"))} if has_bundle else {})}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's ``metrics.jsonl``.

    Raises
    ------
    DataError
        If a line is damaged; names file and line.
    """
    file = run / "metrics.jsonl"
    more = {"cluster": ("loss", "num_examples", "num_clients")}
    return read_json_lines(file, "round", more=more) if file.exists() else []


def show(path: Path, console: Console) -> None:
    """Print a run's progress and its bundle, or only a bundle.

    Raises
    ------
    DataError
        If ``path`` is neither.
    """
    found = look(path)
    if "run" in found:
        _show_run(found["run"], console)
    if "bundle" in found:
        _show_bundle(found["bundle"], console)
    else:
        command = "join" if found["run"]["joined"] else "train"
        console.print(f"no bundle yet; run the same {command} command again to resume")


def _bundle(bundle: Bundle) -> dict[str, Any]:
    return {
        "path": str(bundle.path),
        "base": asdict(bundle.base),
        "rank": bundle.rank,
        "fallback": bundle.fallback,
        "embedder": asdict(bundle.embedder),
        "clusters": [asdict(cluster) for cluster in bundle.clusters],
        "generalist": bundle.generalist,
        "privacy": [{**asdict(guarantee), "text": str(guarantee)} for guarantee in bundle.guarantees],
        "versions": dict(bundle.versions),
    }


def _show_run(run: dict[str, Any], console: Console) -> None:
    def line(text: str) -> None:
        print_line(console, text)

    config = run["config"]
    base = config["base"]["model"]
    line(f"run {run['path']}: {run['num_rounds']} of {config['train']['rounds']} rounds, base {base}")
    for join in run["joined"]:
        moved = [f"{name} (moved)" for name in join.get("moved", {})]
        line(f"joined {join['run']}: {', '.join([*join['clients'], *moved])}")
    for client, reason in run["left_out"].items():
        line(f"left out {client}: {reason}")
    if not run["rounds"]:
        return
    table = Table("task cluster", "loss by round", "first", "last", "examples", "clients", title="training")
    trained = [round_ for round_ in run["rounds"] if round_["loss"] is not None]  # null: no usable update
    for name in sorted({round_["cluster"] for round_ in trained}):
        rounds = [round_ for round_ in trained if round_["cluster"] == name]
        losses = [round_["loss"] for round_ in rounds]
        examples = str(sum(round_["num_examples"] for round_ in rounds))
        ends = f"{losses[0]:.3f}", f"{losses[-1]:.3f}"
        table.add_row(Text(name), spark(losses), *ends, examples, str(rounds[-1]["num_clients"]))
    show_whole(console, Whole(table))


def _show_bundle(bundle: dict[str, Any], console: Console) -> None:
    def line(text: str) -> None:
        print_line(console, text)

    embedder = bundle["embedder"]
    line(f"bundle {bundle['path']}")
    line(f"base {bundle['base']['model']}, rank {bundle['rank']}, fallback {bundle['fallback']}")
    line(f"embedder {embedder['kind']} {embedder['model']}, {embedder['dim']} dimensions")
    heads = ("task cluster", "adapter", "rows", "clients", "radius", "tasks of its rows")
    table = Table(*heads, title="task clusters")
    for c in bundle["clusters"]:
        tasks = ", ".join(f"{task} {count}" for task, count in c["task_counts"].items()) or "no labels"
        figures = str(c["num_examples"]), str(len(c["clients"])), f"{c['radius']:.2f}"
        table.add_row(Text(c["name"]), Text(c["adapter"]), *figures, Text(tasks))
    show_whole(console, Whole(table))
    if bundle["generalist"]:
        line(f"generalist {bundle['generalist']}: for prompts of no task cluster")
    for guarantee in bundle["privacy"]:
        line(f"privacy: {guarantee['text']}")


def spark(values: list[float]) -> str:
    """Draw a series as a line of blocks."""
    low, high = min(values), max(values)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in values)
