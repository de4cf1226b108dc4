"""A real run with noise: reported everywhere, resumed to the same bytes, drawn anew elsewhere."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedrouter.bundle import load_bundle

SETTINGS = [
    "data.num_clients=4", "data.num_per_task=60", "train.rounds=2", "train.steps=2", "train.batch_size=4",
    "cluster.method=kmeans", "cluster.local=2", "cluster.global=4", "routing.fallback=nearest",
    "privacy.clip_embeddings=60", "privacy.centroid_noise=0.2",
    "privacy.clip_updates=0.1", "privacy.update_noise=0.01", "privacy.delta=1e-6",
]  # fmt: skip


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fedrouter", *arguments]


def train(out: Path) -> list[str]:
    return command("train", "--out", str(out), *(part for s in SETTINGS for part in ("--set", s)))


def content(bundle: Path) -> dict[str, bytes]:
    return {str(p.relative_to(bundle)): p.read_bytes() for p in sorted(bundle.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("noise") / "run"
    done = subprocess.run(train(out), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_epsilon_is_printed_and_recorded(run: tuple[Path, str]) -> None:
    out, printed = run
    promised = json.loads((out / "privacy.json").read_text())["guarantees"]
    assert [(g["unit"], g["num_releases"]) for g in promised][:1] == [("row", 5)]
    assert {g["delta"] for g in promised} == {1e-6}
    assert printed.count("privacy: ε = ") == 4
    bundle = load_bundle(out / "bundle")
    assert [g.epsilon for g in bundle.guarantees] == [g["epsilon"] for g in promised]
    assert (bundle.path / "README.md").read_text().count("Differential privacy: ε = ") == 4
    shown = subprocess.run(command("inspect", str(out)), capture_output=True, text=True).stdout
    assert shown.count("privacy: ε = ") == 4
    assert all(c.task_counts == {} for c in bundle.clusters)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {line["loss"] for line in lines} == {None}
    assert all(line["num_clients"] for line in lines)


def test_a_killed_run_repeats_its_noise_and_another_run_draws_its_own(
    run: tuple[Path, str], tmp_path: Path
) -> None:
    out, _ = run
    killed = tmp_path / "killed"
    killed.mkdir()
    shutil.copy(out / "noise.key", killed)
    process = subprocess.Popen(train(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (killed / "checkpoints" / "round-00000").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(train(killed), check=True, stdout=subprocess.DEVNULL)
    assert content(killed / "bundle") == content(out / "bundle")
    subprocess.run(train(tmp_path / "other"), check=True, stdout=subprocess.DEVNULL)
    one, other = (content(p / "bundle")["router.safetensors"] for p in (out, tmp_path / "other"))
    assert one != other


def test_nobody_joins_a_run_with_noise(run: tuple[Path, str], tmp_path: Path) -> None:
    source = tmp_path / "late.jsonl"
    source.write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    join = command("join", str(run[0]), "--client", f"late={source}")
    done = subprocess.run(join, capture_output=True, text=True)
    assert done.returncode == 1
    assert "trained with noise" in done.stderr
