"""A client that fails before the rounds, in a whole run, also in one that is interrupted."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.config import Config
from fedrouter.config_file import load_config
from fedrouter.embed import HiddenStateEmbedder
from fedrouter.train.client.client import Client
from fedrouter.train.run import train
from fedrouter.types import Array, LocalClusters

SETTINGS = ["train.rounds=3", "train.steps=2", "train.batch_size=4", "cluster.every=2"]
QUIET = Console(quiet=True)


def configuration(directory: Path, *clients: str) -> Config:
    for i, client in enumerate(clients):
        records = [r for t in TASKS[i % 2 : i % 2 + 2] for r in generate(t, "train", 30, ord(client))]
        rows = [{"prompt": r.turns[-1].content, "completion": r.completion, "task": r.task} for r in records]
        (directory / f"{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    listed = ", ".join(f'{c} = "{c}.jsonl"' for c in clients)
    (directory / "run.toml").write_text(f"[data]\nclients = {{ {listed} }}\n")
    return load_config(directory / "run.toml", SETTINGS)


def content(run: Path) -> dict[str, bytes]:
    bundle = run / "bundle"
    return {str(p.relative_to(bundle)): p.read_bytes() for p in sorted(bundle.rglob("*")) if p.is_file()}


class Interrupting(Console):
    """Stops the run after a round, as a person would."""

    def __init__(self, number: int):
        super().__init__(quiet=True)
        self.number = number

    def print(self, *objects: Any, **options: Any) -> None:
        if str(objects[0]).startswith(f"round {self.number}/"):
            raise KeyboardInterrupt


@pytest.fixture
def without(tmp_path: Path) -> dict[str, bytes]:
    """Return the bundle of those that never fail."""
    train(configuration(tmp_path, "a", "b", "c"), tmp_path / "without", QUIET)
    return content(tmp_path / "without")


def test_a_run_goes_on_without_clients_that_fail_and_resumes_to_the_same_bytes(
    without: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client d fails in an exchange, e while it embeds; when the run is resumed both would work."""
    config, out = configuration(tmp_path, "a", "b", "c", "d", "e"), tmp_path / "run"
    summarise, embed, num = Client.summarise, HiddenStateEmbedder.embed, 0

    def failing(self: Client, *arguments: Any) -> LocalClusters:
        if self.name == "d":
            raise OSError("disk full")
        return summarise(self, *arguments)

    def breaking(self: HiddenStateEmbedder, texts: Any) -> Array:
        nonlocal num
        num += 1
        if num == 6:  # probe texts, then prompts of a to d: this is e's
            raise RuntimeError("cannot embed")
        return embed(self, texts)

    with monkeypatch.context() as broken:
        broken.setattr(Client, "summarise", failing)
        broken.setattr(HiddenStateEmbedder, "embed", breaking)
        with pytest.raises(KeyboardInterrupt):
            train(config, out, Interrupting(1))
    reasons = json.loads((out / "left_out.json").read_text())
    assert sorted(reasons) == ["d", "e"]
    assert (out / "checkpoints" / "round-00000").exists()

    console = Console(record=True, width=200)
    train(config, out, console)
    text = console.export_text()
    assert "client d stays left out: OSError" in text
    assert "going on after round 1" in text
    assert content(out) == without
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [sorted(line["left_out"]) for line in lines if "left_out" in line] == [["d", "e"]]


def test_one_that_fails_when_clients_are_clustered_anew_leaves_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, assign, asked = configuration(tmp_path, "a", "b", "c", "d"), Client.assign, []

    def failing(self: Client, *arguments: Any) -> Any:
        asked.append(self.name)
        if self.name == "d" and asked.count("d") == 2:
            raise OSError("disk full")
        return assign(self, *arguments)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for out in (whole, killed):
        asked.clear()
        with monkeypatch.context() as broken:
            broken.setattr(Client, "assign", failing)
            if out == whole:
                train(config, out, QUIET)
            else:
                with pytest.raises(KeyboardInterrupt):
                    train(config, out, Interrupting(3))
    train(config, killed, QUIET)
    assert content(killed) == content(whole)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [(line["round"], list(line["left_out"])) for line in lines if "left_out" in line] == [(2, ["d"])]
    manifest = json.loads(content(whole)["manifest.json"])
    assert not any("d" in cluster["clients"] for cluster in manifest["clusters"])
