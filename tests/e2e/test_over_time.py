"""Runs whose clients' rows change: task clusters keep their names, and killed runs end in the same bytes."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.bundle import load_bundle
from fedrouter.config import Config
from fedrouter.config_file import load_config
from fedrouter.train.run import train

SETTINGS = [
    "cluster.every=2",
    "train.rounds=4",
    "train.steps=2",
    "train.batch_size=4",
    "train.validation=0.02",
]
BEFORE = {"a": TASKS[:2], "b": TASKS[1:3], "c": (TASKS[2], TASKS[0]), "d": TASKS[:2]}
MOVED = {**BEFORE, "d": (TASKS[3], TASKS[1])}


def write(directory: Path, client: str, tasks: tuple[str, ...]) -> None:
    """Replace a client's file in one step."""
    records = [r for t in tasks for r in generate(t, "train", 400, ord(client))]
    rows = [{"prompt": r.turns[-1].content, "completion": r.completion, "task": r.task} for r in records]
    (directory / f".{client}").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / f".{client}").replace(directory / f"{client}.jsonl")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for client, tasks in BEFORE.items():
        write(tmp_path, client, tasks)
    clients = ", ".join(f'{c} = "{c}.jsonl"' for c in BEFORE)
    (tmp_path / "run.toml").write_text(f"[data]\nclients = {{ {clients} }}\n")
    return load_config(tmp_path / "run.toml", SETTINGS)


class Noticing(Console):
    """Keeps what is printed; as soon as round 1 is reported, client d has other rows."""

    def __init__(self, files: Path):
        super().__init__(quiet=True)
        self.files, self.lines = files, list[str]()

    def print(self, *objects: Any, **options: Any) -> None:
        self.lines.append(" ".join(map(str, objects)))
        if self.lines[-1].startswith("round 1/"):
            write(self.files, "d", MOVED["d"])
        super().print(*objects, **options)


def content(bundle: Path) -> dict[str, bytes]:
    return {str(p.relative_to(bundle)): p.read_bytes() for p in sorted(bundle.rglob("*")) if p.is_file()}


def test_a_client_moves_while_the_run_goes_on_and_a_killed_run_ends_in_the_same_bytes(
    config: Config, tmp_path: Path
) -> None:
    whole, console = tmp_path / "whole", Noticing(tmp_path)
    train(config, whole, console)
    (anew,) = [line for line in console.lines if line.startswith("clustered anew before round 3: ")]
    new, moved = (part.split(": ")[1].split(", ") for part in anew.split("3: ", 1)[1].split("; "))
    assert "headline" in new
    assert "d" in moved
    # A task may become several task clusters, all of its rows alone; whose they are is what counts here.
    holders: dict[str, set[str]] = {}
    for cluster in load_bundle(whole / "bundle").clusters:
        (task,) = cluster.task_counts
        holders.setdefault(task, set()).update(cluster.clients)
    assert holders == {
        "paraphrase": {"a", "c"},
        "data_to_text": {"a", "b", "d"},
        "dialogue_summary": {"b", "c"},
        "headline": {"d"},
    }
    before = {"paraphrase", "data-to-text", "dialogue-summary"}
    names = {cluster.name for cluster in load_bundle(whole / "bundle").clusters}
    assert names == before | set(new), "no name is lost, none changes"
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    by_round = [{line["cluster"] for line in lines if line["round"] == r} for r in range(4)]
    assert by_round[:2] == [before] * 2
    assert all(before | {"headline"} <= trained <= names for trained in by_round[2:])
    cached = list((whole / "embeddings").iterdir())
    assert len(cached) == len(BEFORE) + 1, "prompts of four clients, and of d once more"

    # Killed after clustering anew, with the files as they were read; the rest with a filled cache.
    killed = tmp_path / "killed"
    write(tmp_path, "d", BEFORE["d"])
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [sys.executable, "-m", "fedrouter", "train", str(tmp_path / "run.toml"), "--out", str(killed)]
    with subprocess.Popen([*command, *settings], stdout=subprocess.DEVNULL) as process:
        for number in (0, 2):
            while not (killed / "checkpoints" / f"round-{number:05d}").exists():
                assert process.poll() is None, "the run ended too early"
                time.sleep(0.01)
            if number:
                process.kill()
            else:
                write(tmp_path, "d", MOVED["d"])
    assert not (killed / "bundle").exists()
    console = Noticing(tmp_path)
    train(config, killed, console)
    assert "going on after round 3" in console.lines
    assert content(killed / "bundle") == content(whole / "bundle")
