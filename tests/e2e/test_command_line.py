"""The command line as a user meets it: processes, exit codes, one clear line."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from fedrouter.config_file import load_config
from fedrouter.train.run import train

SMALL = [
    "data.num_clients=2",
    "data.num_per_task=24",
    "train.rounds=1",
    "train.steps=2",
    "cluster.local=2",
    "cluster.global=4",
]


def fedrouter(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fedrouter", *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    train(load_config(None, [*SMALL, "data.partition=all"]), out, Console(quiet=True))
    return out


def refused(done: subprocess.CompletedProcess[str], *reasons: str) -> None:
    assert done.returncode == 1, done
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for reason in reasons:
        assert reason in done.stderr


def test_help_is_there_at_once() -> None:
    took = []
    for _ in range(3):
        began = time.perf_counter()
        assert "serve" in fedrouter("--help").stdout
        took.append(time.perf_counter() - began)
    assert min(took) < 0.5


def test_a_full_disk_behind_the_output_is_one_line(run: Path) -> None:
    for arguments in (["--help"], ["inspect", str(run)]):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "fedrouter", *arguments],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        refused(done, "cannot write the output: No space left on device")


def test_train_refuses_what_a_user_may_do_wrong(tmp_path: Path) -> None:
    refused(fedrouter("train", "none.toml"), "none.toml: no such file")
    refused(fedrouter("train", "--set", "train.stepz=1"), "unknown key train.stepz; did you mean steps?")
    rows = tmp_path / "one.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    config = tmp_path / "c.toml"
    config.write_text(f'[data]\nclients = {{ a = "{rows}" }}\n')
    refused(fedrouter("train", str(config), "--out", str(tmp_path / "run")), "client a: 1 row")
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    refused(fedrouter("train", str(config), "--out", str(tmp_path / "run")), "one.jsonl", "2")
    assert not (tmp_path / "run" / "bundle").exists()


def test_route_says_where_and_why(run: Path) -> None:
    done = fedrouter(
        "route",
        str(run),
        "Blackford | population | 5683",
        "What does a goose eat? - What should I feed my pig?",
    )
    assert done.returncode == 0, done.stderr
    verdicts = [line for line in done.stdout.splitlines() if line.startswith("→ ")]
    assert len(verdicts) == 2
    assert all(re.search(r": (within|just beyond|far) \(\d+\.\d\d × radius\) of \S", one) for one in verdicts)


def test_route_reads_prompts_from_the_terminal(run: Path) -> None:
    prompts = "Blackford | population | 5683\n\nWhat does a goose eat? - What should I feed my pig?\n"
    done = subprocess.run(
        [sys.executable, "-m", "fedrouter", "route", str(run), "--json"],
        input=prompts,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["prompt"] for one in found] == [line for line in prompts.splitlines() if line]
    for one in found:
        assert one["verdict"].split(" (")[0] in ("within", "just beyond", "far")
        assert one["fallback"] == (one["distance"] > one["radius"])


def test_options_of_serve_that_belong_to_others_are_refused_alone(run: Path) -> None:
    refused(fedrouter("serve", str(run), "--canary", "10"), "--shadow")
    refused(fedrouter("serve", str(run), "--log-vectors"), "--decision-log")
    refused(fedrouter("serve", str(run), "--decision-log", str(run / "no" / "log")), "No such file")


def test_inspect_tells_programs_the_same(run: Path) -> None:
    found = json.loads(fedrouter("inspect", str(run), "--json").stdout)
    manifest = json.loads((run / "bundle" / "manifest.json").read_text())
    assert [one["adapter"] for one in found["bundle"]["clusters"]] == [
        one["adapter"] for one in manifest["clusters"]
    ]
    assert found["run"]["num_rounds"] == 1
    assert "run" not in json.loads(fedrouter("inspect", str(run / "bundle"), "--json").stdout)


def test_report_writes_one_page_of_all_of_it(run: Path) -> None:
    done = fedrouter("report", str(run))
    assert done.returncode == 0, done.stderr
    page = Path(done.stdout.strip().removeprefix("report: "))
    html = page.read_text(encoding="utf-8")
    for cluster in json.loads((run / "bundle" / "manifest.json").read_text())["clusters"]:
        assert cluster["adapter"] in html
    names = {path.stem for path in (run / "report").glob("*.svg")}
    assert names == {"losses", "tsne", "confusion", "calibration", "abstention", "costs"}
    assert names == {path.stem for path in (run / "report").glob("*.png")}
    assert page.stat().st_size < 5_000_000
    refused(fedrouter("report", str(run / "bundle")), "is a bundle")


def test_probe_asks_a_file_and_fails_where_one_goes_elsewhere(run: Path, tmp_path: Path) -> None:
    decided = json.loads(fedrouter("route", str(run), "Blackford | population | 5683", "--json").stdout)
    expected = None if decided["fallback"] else decided["cluster"]
    probes = tmp_path / "probes.jsonl"
    probes.write_text(json.dumps({"prompt": decided["prompt"], "cluster": expected}) + "\n")
    done = fedrouter("probe", str(run), str(probes))
    assert (done.returncode, done.stdout) == (0, "1 of 1 probes hold\n")
    names = [one["name"] for one in json.loads((run / "bundle" / "manifest.json").read_text())["clusters"]]
    other = next(name for name in names if name != decided["cluster"])
    with probes.open("a") as file:
        file.write(json.dumps({"prompt": decided["prompt"], "cluster": other}) + "\n")
    done = fedrouter("probe", str(run), str(probes))
    assert done.returncode == 1
    assert "line 2 (" in done.stdout and f"expected {other}" in done.stdout
    assert json.loads(fedrouter("probe", str(run), str(probes), "--json").stdout)["num_broken"] == 1
    refused(fedrouter("probe", str(run)), "contains no probes")
    with probes.open("a") as file:
        file.write(json.dumps({"prompt": decided["prompt"], "cluster": "nowhere"}) + "\n")
    refused(fedrouter("probe", str(run), str(probes)), f"{probes}, line 3: no task cluster 'nowhere'", *names)


@pytest.mark.parametrize("columns", ["40", "80", "300"])
def test_no_name_is_cut_however_narrow_the_terminal(run: Path, columns: str) -> None:
    manifest = json.loads((run / "bundle" / "manifest.json").read_text())
    names = [one["adapter"] for one in manifest["clusters"]]
    for terminal in ({}, {"FORCE_COLOR": "1", "TERM": "xterm"}):
        for command in ("inspect", "eval-routing"):
            more = ["--data", "builtin:four-tasks", "--limit", "2"] if command == "eval-routing" else []
            done = subprocess.run(
                [sys.executable, "-m", "fedrouter", command, str(run), *more],
                env={**os.environ, "COLUMNS": columns, **terminal},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            assert "…" not in done.stdout
            wanted = names if command == "inspect" else [one["name"] for one in manifest["clusters"]]
            assert not [name for name in wanted if name not in done.stdout]


def test_inspect_shows_runs_and_bundles(run: Path, tmp_path: Path) -> None:
    shown = fedrouter("inspect", str(run)).stdout
    assert "1 of 1 rounds" in shown
    for cluster in json.loads((run / "bundle" / "manifest.json").read_text())["clusters"]:
        assert cluster["name"] in shown
    assert "task clusters" in fedrouter("inspect", str(run / "bundle")).stdout
    refused(fedrouter("inspect", str(tmp_path)), "neither a run")


def test_route_refuses_a_bundle_of_another_base_or_embedder(run: Path, tmp_path: Path) -> None:
    from fedrouter.builtin import base_path

    other = Path(shutil.copytree(base_path("builtin:tiny"), tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    refused(fedrouter("route", str(run), "hello", "--base", str(other)), "trained on base builtin:tiny")

    import torch
    from safetensors.torch import load_file, save_file

    weights = Path(shutil.copytree(base_path("builtin:tiny"), tmp_path / "weights"))
    tensors = {n: t * 1.2 if "mlp" in n else t for n, t in load_file(weights / "model.safetensors").items()}
    assert all(isinstance(t, torch.Tensor) for t in tensors.values())
    save_file(tensors, weights / "model.safetensors", metadata={"format": "pt"})
    refused(fedrouter("route", str(run), "hello", "--base", str(weights)), "not the one used in training")


def test_an_interrupted_training_says_how_to_go_on(tmp_path: Path) -> None:
    import os
    import signal

    out = tmp_path / "run"
    overrides = [
        part for setting in [*SMALL, "data.partition=all", "train.rounds=50"] for part in ("--set", setting)
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedrouter", "train", "--out", str(out), *overrides],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as in a script's background
    )
    while not (out / "checkpoints" / "round-00000").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to resume" in stderr.replace("\n", " ")
    assert not list(out.glob(".*partial")), "nothing half written"
