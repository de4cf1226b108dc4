"""A small grid, as a user runs it: interrupted, gone on with, asked of transformers and of vLLM."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import in_group

from fedrouter.experiment.results import read_results

GRID = """
seeds = [1]
scenarios = ["dual"]
engine = "{engine}"
[search]
learning_rates = [3e-3]
seed = 2
[methods.fedrouter]
[methods.fedavg]
[methods.wrong]
method = "fedrouter"
[methods.wrong.embedder]
kind = "endpoint"
model = "none"
url = "http://127.0.0.1:9"
[run.train]
stacked = true
rounds = 2
steps = 2
batch_size = 4
[run.cluster]
global = 4
[worlds.tiny]
tests = ["builtin:four-tasks"]
unseen = ["unseen.jsonl"]
curve = ["fedavg"]
num_per_task = 3
max_tokens = 6
[worlds.tiny.run.data]
num_clients = 4
num_per_task = 24
"""


def command(folder: Path, *more: str) -> list[str]:
    grid = [sys.executable, "-m", "fedrouter", "experiment", str(folder / "grid.toml")]
    return [*grid, "--out", str(folder / "out"), *more]


def write(folder: Path, engine: str) -> None:
    (folder / "grid.toml").write_text(GRID.format(engine=engine))
    rows = [{"instruction": f"Zxq {n} ∆∆ ¤", "response": "a word", "task": "strange"} for n in range(2)]
    (folder / "unseen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    write(folder, "transformers")
    return folder


def test_one_cell_fails_and_the_others_have_their_lines(done: Path) -> None:
    ran = subprocess.run(command(done, "--jobs", "2"), capture_output=True, text=True, timeout=500)
    assert ran.returncode == 1
    assert "tiny/dual/wrong" in ran.stderr
    assert "Traceback" not in ran.stderr
    lines = read_results(done / "out" / "results.jsonl")
    assert set(lines) == {
        *("search/tiny/dual/fedrouter/2/0.003", "search/tiny/dual/fedavg/2/0.003"),
        *("tiny/dual/fedrouter/1", "tiny/dual/fedavg/1"),
    }
    ours, one = lines["tiny/dual/fedrouter/1"], lines["tiny/dual/fedavg/1"]
    assert ours["engine"] == "transformers"
    assert (ours["adapters"], one["adapters"]) == (4, 1)
    assert ours["learning_rate"] == 3e-3, "the only one that was searched"
    assert {len(p) for p in ours["scores"]["global/all"]["prompts"].values()} == {3}
    assert one["scores"]["global/all"]["tasks"] == one["scores"]["local/all"]["tasks"]
    assert set(ours["unseen"]["strange"]) == {"beyond", "base", "nearest", "generalist", "composed"}
    assert len(one["curve"]) == 2
    last = one["scores"]["global/all"]["prompts"].values()
    assert one["curve"][-1] == pytest.approx(sum(sum(p) / len(p) for p in last) / len(last), abs=2e-3)
    assert "ROUGE-1" in (done / "out" / "report.md").read_text()


def test_what_is_done_is_not_done_again(done: Path) -> None:
    answers = done / "out" / "tiny" / "dual" / "fedavg" / "1" / "answers.jsonl"
    began, lines = answers.stat().st_mtime_ns, read_results(done / "out" / "results.jsonl")
    ran = subprocess.run(
        command(done, "--only", "tiny/dual/fed*/1"), capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stderr
    assert "2 cells, 2 of them done" in ran.stdout
    assert answers.stat().st_mtime_ns == began
    assert read_results(done / "out" / "results.jsonl") == lines


def test_an_interrupted_grid_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    write(tmp_path, "transformers")
    only = ("--only", "tiny/dual/fed*/1", "--jobs", "2")
    process = subprocess.Popen(command(tmp_path, *only), stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while (
        not list((tmp_path / "out").glob("search/*/*/*/*/*/run/config.json")) and time.monotonic() < deadline
    ):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 130
    until = time.monotonic() + 30
    while (left := in_group(process.pid)) and time.monotonic() < until:
        time.sleep(0.2)
    assert not left
    ran = subprocess.run(command(tmp_path, *only), capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr
    assert "tiny/dual/fedavg/1" in read_results(tmp_path / "out" / "results.jsonl")


def test_vllm_answers_for_all_cells_as_transformers_does(done: Path, tmp_path: Path) -> None:
    write(tmp_path, "vllm")
    shutil.copytree(done / "out", tmp_path / "out")
    (tmp_path / "out" / "results.jsonl").write_text(
        "".join(
            json.dumps(line) + "\n"
            for key, line in read_results(done / "out" / "results.jsonl").items()
            if key.startswith("search/")
        )
    )
    ran = subprocess.run(
        command(tmp_path, "--only", "tiny/dual/fed*/1"), capture_output=True, text=True, timeout=500
    )
    assert ran.returncode == 0, ran.stderr + ran.stdout
    there, here = (read_results(folder / "out" / "results.jsonl") for folder in (tmp_path, done))
    for key in ("tiny/dual/fedrouter/1", "tiny/dual/fedavg/1"):
        assert there[key]["engine"] == "vllm"
        theirs, ours = (
            [
                json.loads(text)["answer"]
                for text in (folder / "out" / key / "answers.jsonl").read_text().splitlines()
            ]
            for folder in (tmp_path, done)
        )
        same = [a.strip() == b.strip() for a, b in zip(theirs, ours, strict=True)]
        assert sum(same) >= 0.8 * len(same), "greedy on the same weights; rounding may turn a word"
    assert there["tiny/dual/fedrouter/1"]["unseen"].keys() == here["tiny/dual/fedrouter/1"]["unseen"].keys()
