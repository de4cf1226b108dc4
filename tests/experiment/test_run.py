"""A grid resumes where it stopped, and a failing cell does not stop the others."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_up import lines_of, settings_of
from rich.console import Console

from fedrouter.errors import DataError, ServingError, TrainingError
from fedrouter.experiment import run
from fedrouter.experiment.cell import Trained
from fedrouter.experiment.engine import Engine
from fedrouter.experiment.grid import Cell
from fedrouter.experiment.results import read_results, write_results
from fedrouter.experiment.settings import Search, Settings

QUIET = Console(quiet=True)
SETTINGS = settings_of(["fedrouter", "fedavg"], [1, 2]).model_copy(
    update={"search": Search(learning_rates=[0.1, 0.2], seed=9)}
)
LINES = lines_of(SETTINGS, lambda *_: 0.5)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Cell], set[str]]:
    """Replace the cells with fakes that finish immediately; two of them fail until ``broken`` is cleared."""
    found: list[Cell] = []
    broken = {"w/dual/fedavg/1"}

    def run_cell(settings: Settings, cell: Cell, out: Path) -> dict[str, Any] | str:
        found.append(cell)
        if cell.key in broken:
            return "RuntimeError: no"
        if cell.search:
            assert cell.rate is not None
            best = {"fedrouter": 0.2, "fedavg": 0.1}[cell.method]
            line = {"world": "w", "method": cell.method, "learning_rate": cell.rate, "train_seconds": 1.0}
            return {**line, "key": cell.key, "loss": abs(cell.rate - best)}
        return {**LINES[cell.key], "learning_rate": cell.rate}

    monkeypatch.setattr(run, "run_cell", run_cell)
    return found, broken


def test_cells_get_the_rate_that_was_found_and_failures_are_tried_again(
    asked: tuple[list[Cell], set[str]], tmp_path: Path
) -> None:
    cells, broken = asked
    with pytest.raises(
        TrainingError, match=r"1 cells failed, the first was w/dual/fedavg/1: RuntimeError: no"
    ):
        run.run_experiment(SETTINGS, tmp_path, QUIET)
    assert len(cells) == 4 + 12
    rates = {(c.method, c.rate) for c in cells if not c.search}
    assert rates == {("fedrouter", 0.2), ("fedavg", 0.1)}
    assert (tmp_path / "report.html").is_file()
    cells.clear()
    broken.clear()
    lines = run.run_experiment(SETTINGS, tmp_path, QUIET)
    assert [c.key for c in cells] == ["w/dual/fedavg/1"], "only what has no line yet"
    assert len(lines) == 16


def test_cells_with_another_rate_than_the_longer_search_found_run_again(
    asked: tuple[list[Cell], set[str]], tmp_path: Path
) -> None:
    cells, broken = asked
    broken.clear()
    lines = run.run_experiment(SETTINGS, tmp_path, QUIET)
    for line in lines.values():
        if line["method"] == "fedavg" and "loss" not in line:
            line["learning_rate"] = 0.2
    write_results(tmp_path / "results.jsonl", lines)
    (tmp_path / "w/all/fedavg/1").mkdir(parents=True)
    cells.clear()
    run.run_experiment(SETTINGS, tmp_path, QUIET)
    assert {(c.method, c.search) for c in cells} == {("fedavg", False)}
    assert not (tmp_path / "w/all/fedavg/1").exists()


def test_a_part_of_the_grid_keeps_the_lines_of_the_others(
    asked: tuple[list[Cell], set[str]], tmp_path: Path
) -> None:
    kept = tmp_path / "kept.jsonl"
    write_results(kept, {"w/single/fedavg/2": LINES["w/single/fedavg/2"]})
    run.run_experiment(SETTINGS, tmp_path / "out", QUIET, only=["w/all/*/1"], results=kept)
    keys = set(read_results(kept))
    assert {"w/single/fedavg/2", "w/all/fedavg/1", "w/all/fedrouter/1"} <= keys
    assert not any(key.startswith("w/dual/") for key in keys)


def test_one_vllm_answers_for_all_cells_of_a_base(
    asked: tuple[list[Cell], set[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cells, broken = asked
    broken.clear()
    served: list[tuple[Path, dict[str, Path]]] = []
    answered: list[tuple[str, str]] = []

    def trained(settings: Settings, cell: Cell, out: Path) -> Trained:
        paths = {f"{cell.method}-{cell.seed}": tmp_path / cell.key}
        bundle: Any = SimpleNamespace(adapter_paths=paths, path=tmp_path / cell.key)
        config: Any = SimpleNamespace(method="fedavg")
        return Trained(cell, config, bundle, tmp_path / cell.key, 1.0)

    @contextmanager
    def server(bundle: Path, options: Any, log: Path) -> Iterator[str]:
        served.append((bundle, dict(options.adapters)))
        yield "http://127.0.0.1:1"

    def tested(settings: Settings, cell: Trained, engine: Engine) -> dict[str, Any]:
        answered.append((cell.cell.key, engine.name))
        if cell.cell.seed == 2:
            raise ServingError("it went away")
        return LINES[cell.cell.key]

    monkeypatch.setattr(run, "train_cell", trained)
    monkeypatch.setattr(run, "find_base", lambda bundle: Path("base"))
    monkeypatch.setattr(run, "running_server", server)
    monkeypatch.setattr(run, "tested", tested)
    settings = SETTINGS.model_copy(update={"engine": "vllm"})
    with pytest.raises(TrainingError, match=r"2 cells failed.*it went away"):
        run.run_experiment(settings, tmp_path, QUIET, only=["w/dual/*"])
    ((first, others),) = served
    assert first == tmp_path / "w/dual/fedrouter/1"
    assert set(others) == {"fedavg-1", "fedrouter-2", "fedavg-2"}
    assert [key for key, _ in answered] == [c.key for c in cells if not c.search]
    assert {name for _, name in answered} == {"vllm"}
    assert {k for k in read_results(tmp_path / "results.jsonl") if not k.startswith("search")} == {
        "w/dual/fedrouter/1", "w/dual/fedavg/1",
    }  # fmt: skip


def test_a_line_that_was_cut_off_is_left_out_and_any_other_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text('{"key": "a"}\n{"key": "b"')
    assert set(read_results(file)) == {"a"}
    file.write_text('{"key": "a"\n{"key": "b"}\n')
    with pytest.raises(DataError, match=r"results\.jsonl:1"):
        read_results(file)
