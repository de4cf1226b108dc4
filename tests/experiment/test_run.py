"""A grid goes on with where it stopped, and one cell that fails ends no other."""

from pathlib import Path

import pytest
from made_up import lines_of, settings_of
from rich.console import Console

from fedrouter.errors import DataError, TrainingError
from fedrouter.experiment import run
from fedrouter.experiment.results import read_results, write_results
from fedrouter.experiment.settings import Search

QUIET = Console(quiet=True)
SETTINGS = settings_of(["fedrouter", "fedavg"], [1, 2]).model_copy(
    update={"search": Search(learning_rates=[0.1, 0.2], seed=9)}
)
LINES = lines_of(SETTINGS, lambda *_: 0.5)


@pytest.fixture
def asked(monkeypatch):
    """Stand in for cells: they end at once, and two of them fail until told otherwise."""
    found, broken = [], {"w/dual/fedavg/1"}

    def run_cell(settings, cell, out):
        found.append(cell)
        if cell.key in broken:
            return "RuntimeError: no"
        if cell.search:
            best = {"fedrouter": 0.2, "fedavg": 0.1}[cell.method]
            line = {"world": "w", "method": cell.method, "learning_rate": cell.rate, "train_seconds": 1.0}
            return {**line, "key": cell.key, "loss": abs(cell.rate - best)}
        return LINES[cell.key]

    monkeypatch.setattr(run, "run_cell", run_cell)
    return found, broken


def test_cells_get_the_rate_that_was_found_and_failures_are_tried_again(asked, tmp_path: Path):
    cells, broken = asked
    with pytest.raises(TrainingError, match=r"1 cells failed, the first w/dual/fedavg/1: RuntimeError: no"):
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


def test_a_part_of_the_grid_keeps_the_lines_of_the_others(asked, tmp_path: Path):
    kept = tmp_path / "kept.jsonl"
    write_results(kept, {"w/single/fedavg/2": LINES["w/single/fedavg/2"]})
    run.run_experiment(SETTINGS, tmp_path / "out", QUIET, only=["w/all/*/1"], results=kept)
    keys = set(read_results(kept))
    assert {"w/single/fedavg/2", "w/all/fedavg/1", "w/all/fedrouter/1"} <= keys
    assert not any(key.startswith("w/dual/") for key in keys)


def test_a_line_that_was_cut_off_is_left_out_and_any_other_is_refused(tmp_path: Path):
    file = tmp_path / "results.jsonl"
    file.write_text('{"key": "a"}\n{"key": "b"')
    assert set(read_results(file)) == {"a"}
    file.write_text('{"key": "a"\n{"key": "b"}\n')
    with pytest.raises(DataError, match=r"results\.jsonl:1"):
        read_results(file)
