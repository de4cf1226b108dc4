"""Late clients through the command line, on a run that was really trained."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.bundle import Bundle, find_base, find_embedder, load_bundle
from fedrouter.embed import routing_text
from fedrouter.route import Router
from fedrouter.types import Record


def fedrouter(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fedrouter", *arguments], capture_output=True, text=True)


def write(path: Path, records: list[Record]) -> Path:
    rows = [{"prompt": r.turns[-1].content, "completion": r.completion, "task": r.task} for r in records]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("join") / "run"
    settings = ["data.num_per_task=240", "train.rounds=1", "train.steps=2", "train.batch_size=4"]
    done = fedrouter("train", "--out", str(out), *(part for s in settings for part in ("--set", s)))
    assert done.returncode == 0, done.stderr
    return out


def content(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()
    }


def accuracy(bundle: Bundle, task: str) -> float:
    embedder = find_embedder(bundle, find_base(bundle))
    vectors = embedder.embed([routing_text(r.turns) for r in generate(task, "test", 150, 9)])
    name = next(c.name for c in bundle.clusters if max(c.task_counts, key=lambda t: c.task_counts[t]) == task)
    return float(np.mean([d.cluster == name and not d.fallback for d in Router(bundle).route(vectors)]))


def test_a_fifth_task_joins_and_the_others_keep_their_routing_and_adapters(run: Path, tmp_path: Path) -> None:
    rows = generate("headline", "train", 60, 4) + generate("recipe_ingredients", "train", 120, 4)
    out, source = tmp_path / "joined", write(tmp_path / "late.jsonl", rows)
    old, before = load_bundle(run / "bundle"), content(run)
    command = ["join", str(run), "--client", f"late={source}", "--out", str(out)]
    done = fedrouter(*command)
    assert done.returncode == 0, done.stderr
    assert content(run) == before
    new = load_bundle(out / "bundle")
    assert [c.name for c in new.clusters[4:]] == ["recipe-ingredients"]
    headline = next(c for c in new.clusters if c.name == "headline")
    assert "late" in headline.clients
    for c in old.clusters:
        assert content(old.adapter_path(c)) == content(new.path / "adapters" / c.adapter)
    for task in TASKS:
        assert accuracy(new, task) >= accuracy(old, task) - 0.01
    assert accuracy(new, "recipe_ingredients") >= 0.95

    bytes_of = content(out / "bundle")
    again = fedrouter(*command)
    assert "joined already" in again.stdout
    assert content(out / "bundle") == bytes_of
    assert "late" in fedrouter("inspect", str(out)).stdout
    taken = fedrouter("join", str(out), "--client", f"late={source}", "--out", str(tmp_path / "more"))
    assert (taken.returncode, "has a client of that name" in taken.stderr) == (1, True)


def test_a_client_whose_data_has_changed_moves(run: Path, tmp_path: Path) -> None:
    old = load_bundle(run / "bundle")
    before = {c.name for c in old.clusters if "client-0" in c.clients}
    there = next(c.name for c in old.clusters if c.name not in before)
    task = next(t for t in TASKS if t.replace("_", "-") == there)
    source, out = write(tmp_path / "now.jsonl", generate(task, "train", 60, 5)), tmp_path / "moved"
    done = fedrouter("join", str(run), "--moved", f"client-0={source}", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert f"task cluster {there}: also client-0" in done.stdout
    new = load_bundle(out / "bundle")
    assert {c.name for c in new.clusters if "client-0" in c.clients} == {there}
    for c, was in zip(new.clusters, old.clusters, strict=True):
        assert set(c.clients) ^ set(was.clients) <= {"client-0"}
        assert c.adapter == was.adapter, "nothing was trained"
    assert not (out / "checkpoints").exists()
    assert "client-0 (moved)" in fedrouter("inspect", str(out)).stdout
    for arguments, why in (
        (("--moved", f"nobody={source}"), "no client of that name to move"),
        (("--client", f"client-0={source}"), "or give it with --moved"),
        ((), "no client to join"),
    ):
        refused = fedrouter("join", str(run), *arguments, "--out", str(tmp_path / "refused"))
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
        assert why in refused.stderr


def test_refusals(run: Path, tmp_path: Path) -> None:
    few = write(tmp_path / "few.jsonl", generate("recipe_ingredients", "train", 12, 4))
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text((run / "config.json").read_text())
    for where, why in (
        (tmp_path / "none", "is not a run"),
        (tmp_path / "unfinished", "is not finished"),
        (run, "too few"),
    ):
        done = fedrouter("join", str(where), "--client", f"late={few}", "--out", str(tmp_path / "out"))
        assert done.returncode == 1
        assert why in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
