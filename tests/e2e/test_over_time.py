"""Runs whose clients' rows change: task clusters keep their names, and killed runs end in the same bytes."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.bundle import load_bundle

SETTINGS = [
    "cluster.every=2",
    "train.rounds=6",
    "train.steps=2",
    "train.batch_size=4",
    "train.validation=0.1",
]
BEFORE = {"a": TASKS[:2], "b": TASKS[1:3], "c": (TASKS[2], TASKS[0]), "d": TASKS[:2]}
MOVED = {**BEFORE, "d": (TASKS[3], TASKS[1])}


def write(directory: Path, client: str, tasks: tuple[str, ...]) -> None:
    """Replace a client's file in one step."""
    records = [r for t in tasks for r in generate(t, "train", 60, ord(client))]
    rows = [{"prompt": r.turns[-1].content, "completion": r.completion, "task": r.task} for r in records]
    (directory / f".{client}").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / f".{client}").replace(directory / f"{client}.jsonl")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    directory = tmp_path / "data"
    directory.mkdir()
    for client, tasks in BEFORE.items():
        write(directory, client, tasks)
    clients = ", ".join(f'{c} = "data/{c}.jsonl"' for c in BEFORE)
    (tmp_path / "run.toml").write_text(f"[data]\nclients = {{ {clients} }}\n")
    return directory


def start(files: Path, out: Path) -> subprocess.Popen[str]:
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [sys.executable, "-m", "fedrouter", "train", str(files.parent / "run.toml"), "--out", str(out)]
    return subprocess.Popen([*command, *settings], stdout=subprocess.PIPE, text=True)


def after_round(out: Path, number: int, do: Callable[[], None], process: subprocess.Popen[str]) -> None:
    """Do something as soon as a round's checkpoint is there."""
    while not (out / "checkpoints" / f"round-{number:05d}").exists():
        assert process.poll() is None, "the run ended too early"
        time.sleep(0.01)
    do()


def content(bundle: Path) -> dict[str, bytes]:
    return {str(p.relative_to(bundle)): p.read_bytes() for p in sorted(bundle.rglob("*")) if p.is_file()}


def test_a_client_moves_while_the_run_goes_on_and_a_killed_run_ends_in_the_same_bytes(
    files: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    process = start(files, whole)
    after_round(whole, 0, lambda: write(files, "d", MOVED["d"]), process)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert "clustered anew before round 3: new: headline; moved: d" in printed
    assert "clustered anew before round 5: nothing has changed" in printed
    bundle = load_bundle(whole / "bundle")
    holders = {c.name: set(c.clients) for c in bundle.clusters}
    assert holders == {
        "paraphrase": {"a", "c"},
        "data-to-text": {"a", "b", "d"},
        "dialogue-summary": {"b", "c"},
        "headline": {"d"},
    }
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    by_round = {r: {line["cluster"] for line in lines if line["round"] == r} for r in range(6)}
    assert by_round[0] == by_round[1] == set(holders) - {"headline"}
    assert by_round[2] == by_round[5] == set(holders)

    # Killed in the second stretch and in the third, with the files as they were read.
    killed = tmp_path / "killed"
    for client, tasks in BEFORE.items():
        write(files, client, tasks)
    process = start(files, killed)
    after_round(killed, 0, lambda: write(files, "d", MOVED["d"]), process)
    for number in (2, 4):
        after_round(killed, number, process.kill, process)
        process.wait()
        process = start(files, killed)
    printed, _ = process.communicate()
    assert process.returncode == 0
    assert "going on after round" in printed
    assert content(killed / "bundle") == content(whole / "bundle")

    # What was embedded is on disk; damaged, it is computed again to the same bytes.
    again = tmp_path / "again"
    cached = sorted((whole / "embeddings").iterdir())
    assert len(cached) == 2 * (len(BEFORE) + 1), "prompts and completions of four clients, and of d once more"
    shutil.copytree(whole / "embeddings", again / "embeddings")
    next(f for f in sorted((again / "embeddings").iterdir()) if f.suffix).write_bytes(b"damaged")
    third = tmp_path / "third"
    for out in (again, third):
        process = start(files, out)
        process.communicate()
        assert process.returncode == 0
    assert content(again / "bundle") == content(third / "bundle")
