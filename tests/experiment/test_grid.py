"""File → cells, and cell → training configuration."""

import json
from pathlib import Path

import pytest

from fedrouter.errors import ConfigError, DataError
from fedrouter.experiment.grid import Cell, cells_of, config_of, has_curve, questions_of, search_of, with_rate
from fedrouter.experiment.settings import Settings, load_experiment

FILE = """
seeds = [1, 2]
scenarios = ["single", "dual"]
[search]
learning_rates = [1e-3, 1e-2]
[methods.fedrouter]
[methods.told]
method = "fedrouter"
given = true
[methods.fedavg]
[methods.fedprox.train]
proximal = 0.1
[run.train]
rounds = 3
[run.cluster]
local = 4
[worlds.tiny]
tests = ["builtin:four-tasks"]
curve = ["fedavg"]
num_per_task = 2
[worlds.tiny.run.train]
steps = 7
[worlds.few]
tests = ["part-*.jsonl"]
methods = ["fedavg"]
scenarios = ["all"]
seeds = [9]
rates = { fedavg = 0.5 }
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    for name in ("part-b", "part-a"):
        line = json.dumps({"instruction": name, "response": "yes", "task": name}) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(3 * line)
    (tmp_path / "grid.toml").write_text(FILE)
    return load_experiment(tmp_path / "grid.toml")


def test_cells_come_seed_by_seed(settings: Settings) -> None:
    cells = cells_of(settings)
    assert len(cells) == 2 * 2 * 4 + 1
    assert [c.seed for c in cells] == [1] * 8 + [2] * 8 + [9]
    assert [c.key for c in cells_of(settings, ["tiny/dual/fed*/2", "few/*"])] == [
        "tiny/dual/fedrouter/2", "tiny/dual/fedavg/2", "tiny/dual/fedprox/2", "few/all/fedavg/9",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="no cell"):
        cells_of(settings, ["nothing"])


def test_sections_lie_over_each_other(settings: Settings) -> None:
    config = config_of(settings, Cell("tiny", "single", "fedprox", 5, 0.01), 4)
    assert (config.method, config.seed, config.data.partition) == ("fedprox", 5, "single")
    assert (config.train.rounds, config.train.steps, config.train.proximal) == (3, 7, 0.1)
    assert (config.train.learning_rate, config.train.learning_rate_end) == (0.01, 0.0005)
    assert config.cluster.local == "auto", "a baseline has no use for it"
    told = config_of(settings, Cell("tiny", "dual", "told", 1), 4)
    assert (told.method, told.cluster.global_, told.cluster.local) == ("fedrouter", 4, 4)
    assert config_of(settings, Cell("tiny", "dual", "fedrouter", 1), 4).cluster.global_ == "auto"


def test_k_means_is_told_how_many_tasks_a_client_holds(settings: Settings) -> None:
    settings.methods["told"]["cluster"] = {"method": "kmeans"}
    numbers = {
        scenario: config_of(settings, Cell("tiny", scenario, "told", 1), 4).cluster
        for scenario in ("single", "dual", "all")
    }
    assert {s: (c.local, c.global_) for s, c in numbers.items()} == {
        "single": (1, 4), "dual": (2, 4), "all": (4, 4),
    }  # fmt: skip


def test_learning_rates_are_searched_where_none_is_given(settings: Settings) -> None:
    cells = cells_of(settings)
    search = search_of(settings, cells)
    assert {(c.world, c.method, c.rate) for c in search} == {
        ("tiny", m, r) for m in ("fedrouter", "told", "fedavg", "fedprox") for r in (1e-3, 1e-2)
    }
    assert config_of(settings, search[0], 4).train.validation == 0.1
    assert with_rate(settings, cells[0], {1e-3: 2.0, 1e-2: 1.5}).rate == 1e-2
    assert with_rate(settings, cells[0], {}).rate is None
    assert with_rate(settings, cells[-1], {1e-3: 2.0}).rate == 0.5
    assert len({c.key for c in [*cells, *search]}) == len(cells) + len(search)


def test_what_is_tested_after_every_round_keeps_its_checkpoints(settings: Settings) -> None:
    shown, other = Cell("tiny", "dual", "fedavg", 1), Cell("tiny", "dual", "fedavg", 2)
    assert has_curve(settings, shown)
    assert not has_curve(settings, other)
    assert config_of(settings, shown, 4).train.keep_checkpoints >= 3
    assert config_of(settings, other, 4).train.keep_checkpoints == 2


def test_tests_are_found_beside_the_file(settings: Settings) -> None:
    assert [t.task for t in questions_of(settings.worlds["few"])] == ["part-a"] * 3 + ["part-b"] * 3
    assert len(questions_of(settings.worlds["tiny"])) == 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seeds = []\n", "seeds"),
        ("seed = 1\n", "seed"),
        ("seeds=[1]\n[methods.fedavg]\n[worlds.w]\ntests=['x']\nmethods=['fedavgg']\n", "fedavgg"),
        ("seeds=[1]\n[methods.'a/b']\n[worlds.w]\ntests=['x']\n", "a/b"),
        ("seeds = [", "grid.toml"),
    ],
)
def test_a_file_that_is_wrong_is_refused_in_a_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "grid.toml").write_text(text)
    with pytest.raises(ConfigError, match=said) as refused:
        load_experiment(tmp_path / "grid.toml")
    assert "\n" not in str(refused.value)


def test_a_cell_that_does_not_fit_is_named(settings: Settings) -> None:
    settings.methods["fedavg"]["train"] = {"steps": 0}
    with pytest.raises(ConfigError, match=r"tiny/dual/fedavg/1: train\.steps"):
        config_of(settings, Cell("tiny", "dual", "fedavg", 1), 4)


def test_tests_that_are_not_there_are_named(settings: Settings) -> None:
    settings.worlds["few"].tests[:] = ["./none-*.jsonl"]
    with pytest.raises(DataError, match=r"none-\*\.jsonl"):
        questions_of(settings.worlds["few"])


@pytest.mark.parametrize("name", ["paper.toml", "paper_small.toml"])
def test_the_examples_are_experiments(name: str) -> None:
    file = Path(__file__).parents[2] / "examples" / name
    settings = load_experiment(file)
    for world in settings.worlds:
        for cell in cells_of(settings, [f"{world}/*"]):
            config_of(settings, cell, 4)
