"""Real training, small: TRL, PEFT and the built-in base."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from fedrouter.builtin import base_path
from fedrouter.bundle import Bundle, load_bundle
from fedrouter.config_file import load_config
from fedrouter.errors import ConfigError, DataError, TrainingError
from fedrouter.train.run import train

SMALL = [
    "data.num_clients=4",
    "data.num_per_task=24",
    "train.rounds=2",
    "train.steps=2",
    "train.batch_size=4",
    "cluster.local=2",
    "cluster.global=4",
]
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "small"
    train(load_config(None, SMALL), out, QUIET)
    return out


def content(bundle: Path) -> dict[str, bytes]:
    return {str(p.relative_to(bundle)): p.read_bytes() for p in sorted(bundle.rglob("*")) if p.is_file()}


def test_a_run_leaves_a_bundle_metrics_and_its_configuration(run: Path) -> None:
    bundle = load_bundle(run / "bundle")
    assert len(bundle.clusters) == 4
    assert sum(c.num_examples for c in bundle.clusters) == 96
    states = [load_file(bundle.adapter_path(c) / "adapter_model.safetensors") for c in bundle.clusters]
    assert bundle.generalist is not None
    general = load_file(bundle.adapter_paths[bundle.generalist] / "adapter_model.safetensors")
    for name, array in general.items():
        want = np.average(
            [s[name] for s in states], axis=0, weights=[c.num_examples for c in bundle.clusters]
        )
        np.testing.assert_allclose(array, want, rtol=1e-5, atol=1e-7)
    assert json.loads((run / "config.json").read_text())["train"]["rounds"] == 2
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["round"] for line in lines} == {0, 1}
    assert all(line["loss"] > 0 and line["drift"] > 0 for line in lines)
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["round-00000", "round-00001"]


def test_every_adapter_loads_in_plain_peft_and_changes_the_base(run: Path) -> None:
    bundle = load_bundle(run / "bundle")
    ids = torch.arange(10, 30)[None]
    base = AutoModelForCausalLM.from_pretrained(base_path("builtin:tiny"), dtype=torch.float32)
    with torch.no_grad():
        plain = base(ids).logits
        for cluster in bundle.clusters:
            model = PeftModel.from_pretrained(base, bundle.adapter_path(cluster))
            assert not torch.allclose(model(ids).logits, plain), cluster.name
            base = model.unload()
        assert torch.allclose(base(ids).logits, plain)


def test_the_same_seed_gives_byte_identical_bundles(run: Path, tmp_path: Path) -> None:
    train(load_config(None, SMALL), tmp_path / "again", QUIET)
    assert content(run / "bundle") == content(tmp_path / "again" / "bundle")


def test_another_seed_gives_another_bundle(run: Path, tmp_path: Path) -> None:
    train(load_config(None, [*SMALL, "seed=1"]), tmp_path / "other", QUIET)
    assert (
        content(run / "bundle")["router.safetensors"]
        != content(tmp_path / "other" / "bundle")["router.safetensors"]
    )


def test_a_killed_run_goes_on_to_the_same_bytes(run: Path, tmp_path: Path) -> None:
    """With another process training beside it, which must not outlive it; ``run`` had one alone."""
    out = tmp_path / "killed"
    overrides = [part for setting in SMALL for part in ("--set", setting)]
    command = [sys.executable, "-m", "fedrouter", "train", "--processes", "2", "--out", str(out), *overrides]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "checkpoints" / "round-00000").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    started = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert started
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive
    assert not (out / "bundle").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "going on after round" in done.stdout
    assert content(run / "bundle") == content(out / "bundle")
    rounds = [json.loads(line)["round"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rounds == sorted(rounds)


def test_a_finished_run_is_not_trained_again(run: Path) -> None:
    before = (run / "metrics.jsonl").stat().st_mtime_ns
    bundle = train(load_config(None, SMALL), run, QUIET)
    assert isinstance(bundle, Bundle)
    assert (run / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_run_with_another_configuration_is_not_mixed_in(run: Path) -> None:
    with pytest.raises(TrainingError, match=r"train\.rounds, train\.steps differ"):
        train(load_config(None, [*SMALL, "train.rounds=3", "train.steps=3"]), run, QUIET)


def test_what_cannot_be_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"Say {n}.", "completion": str(n)}) for n in range(7)]
    (tmp_path / "one.jsonl").write_text(rows[0])
    (tmp_path / "seven.jsonl").write_text("\n".join(rows))
    files = f'data.clients={{a="{tmp_path}/seven.jsonl", b="{tmp_path}/one.jsonl"}}'
    for settings, error, message in (
        ([*SMALL, "cluster.local=5000"], TrainingError, "5000 local clusters but only"),
        ([*SMALL, "data.source=builtin:five-tasks"], ConfigError, "builtin:five-tasks"),
        (["data={}", files], DataError, r"client b: 1 row in .*one\.jsonl; .*at least 5"),
    ):
        with pytest.raises(error, match=message):
            train(load_config(None, settings), tmp_path / "run", QUIET)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "more", "sizes"),
    [
        ("fedavg", [], [96]),
        ("fedprox", ["train.proximal=0.1"], [96]),
        ("local", [], [24] * 4),
        ("feddpa", [], [24] * 4),
        ("clustered", ["cluster.global=2"], [48, 48]),
        ("oracle", ["cluster={}"], [24] * 4),
    ],
)
def test_every_method_trains_to_a_bundle(
    method: str, more: list[str], sizes: list[int], tmp_path: Path
) -> None:
    settings = [*SMALL, "cluster={}", f"method={method}", "lora.rank=4", *more]
    bundle = train(load_config(None, settings), tmp_path / method, QUIET)
    found = [cluster.num_examples for cluster in bundle.clusters]
    assert sum(found) == sum(sizes)
    assert len(found) == len(sizes)
    assert all(np.isfinite(cluster.radius) for cluster in bundle.clusters)
    rows = json.loads((tmp_path / method / "tsne.json").read_text())["clusters"]
    assert set(rows) == {cluster.name for cluster in bundle.clusters}
