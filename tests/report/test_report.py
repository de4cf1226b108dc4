"""A report shows the contents of a run, in one file without external resources."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from fedrouter.config import Config
from fedrouter.errors import ConfigError, DataError, FedRouterError
from fedrouter.evaluate.offline import Abstention, RoutingReport, TaskRouting, stated_quantile
from fedrouter.report import write_report
from fedrouter.report.figures import drawn, figures
from fedrouter.report.gather import Facts
from fedrouter.train.run import refuse_another_run

NASTY = '<script>alert("x")</script>'


def write_run(path: Path, rounds: int = 3, **changes: Any) -> Path:
    path.mkdir()
    config = Config().model_dump(mode="json", by_alias=True)
    (path / "config.json").write_text(json.dumps(config))
    lines = [
        {"round": number, "cluster": name, "loss": 2.0 / (number + 1), "num_examples": 8, "num_clients": 2}
        | {"num_bytes": 2**20, "seconds": 1.5}
        | changes
        for number in range(rounds)
        for name in ("headline", NASTY)
    ]
    left_out = {"round": 0, "left_out": {"ann": NASTY}}
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [left_out, *lines]))
    return path


def test_a_run_that_is_not_finished_is_reported_as_far_as_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    page = write_report(run)
    html = page.read_text(encoding="utf-8")
    assert page == run / "report.html"
    assert f"3 of {Config().train.rounds}" in html and "there is no bundle yet" in html
    assert {path.name for path in (run / "report").iterdir()} == {
        f"{name}.{kind}" for name in ("losses", "costs") for kind in ("svg", "png")
    }
    assert html.count("data:image/svg+xml;base64,") == 2
    assert not list(run.glob(".*")), "nothing half written"


def test_it_asks_nobody_and_takes_names_as_text(tmp_path: Path) -> None:
    html = write_report(write_run(tmp_path / "run")).read_text(encoding="utf-8")
    assert NASTY not in html
    assert "&lt;script&gt;" in html
    assert set(re.findall(r'(?:src|href|url)\s*[=(]\s*"?(\w+):', html)) == {"data"}
    assert "<script" not in html and "@import" not in html


def test_the_same_facts_make_the_same_figures(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_report(run)
    first = {path.name: path.read_bytes() for path in (run / "report").iterdir()}
    write_report(run)
    assert {path.name: path.read_bytes() for path in (run / "report").iterdir()} == first


def test_a_run_without_losses_says_so(tmp_path: Path) -> None:
    html = write_report(write_run(tmp_path / "run", loss=None)).read_text(encoding="utf-8")
    assert "No loss is known yet." in html


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a run"):
        write_report(tmp_path)


@pytest.mark.parametrize("taken", ["report.html", "report", "report/losses.svg"])
def test_a_place_that_is_taken_is_named(tmp_path: Path, taken: str) -> None:
    place = write_run(tmp_path / "run") / taken
    if taken == "report":
        place.touch()
    else:
        place.mkdir(parents=True)
    with pytest.raises(
        ConfigError, match=f"^cannot write {place.with_suffix('')}.*: .*; choose another place"
    ):
        write_report(tmp_path / "run")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("metrics.jsonl", b'{"round": 0, "left_out": {}}\n{"round": 1, "clu', "metrics.jsonl:2: damaged"),
        ("metrics.jsonl", b"[1]\n", "metrics.jsonl:1: damaged"),
        ("metrics.jsonl", b"\xff\xff\n", "metrics.jsonl:1: damaged"),
        ("config.json", b'{"seed": 0', "config.json: not readable as a run's configuration"),
        ("config.json", b"[]", "config.json: not readable as a run's configuration"),
        ("config.json", b"\xff", "config.json: not readable as a run's configuration"),
        ("config.json", b'{"train": {"rounds": 0}}', "config.json: train.rounds: Input should be greater"),
        ("joined.json", b"[", "joined.json: cannot be read as JSON"),
        ("tsne.json", b"", "tsne.json: cannot be read as JSON"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(tmp_path: Path, file: str, content: bytes, reason: str) -> None:
    run = write_run(tmp_path / "run")
    (run / file).write_bytes(content)
    with pytest.raises(FedRouterError, match=f"^{run}/{reason}"):
        write_report(run)
    if file == "config.json":
        with pytest.raises(FedRouterError, match=reason):
            stated_quantile(run / "bundle")
        with pytest.raises(FedRouterError, match=reason):
            refuse_another_run(Config(), run)


def test_every_figure_is_drawn_from_its_facts() -> None:
    ratios = tuple(np.linspace(0.2, 1.4, 101))
    tasks = {
        "known": TaskRouting(True, 10, 0.9, 0.8, {"a": 9, "b": 1}, ratios),
        "strange": TaskRouting(False, 10, None, 0.1, {"b": 10}, ratios),
    }
    curve = tuple(Abstention(factor, 0.1, None, 0.9) for factor in (0.5, 1.0, 2.0))
    facts = Facts(
        run={"rounds": [], "num_rounds": 0, "config": {"train": {"rounds": 1}}},
        bundle=None,
        tsne={
            "points": [[0, 1], [1, 0], [2, 2]],
            "clients": ["x", "x", "y"],
            "tasks": ["t", None, "u"],
            "clusters": ["a", "b", "b"],
        },
        routing=RoutingReport(tasks, 0.9, 0.8, 0.97, 0.8, curve),
        data=["test.jsonl"],
        scores=None,
    )
    made = {name: drawn(figure) for name, _, figure in figures(facts)}
    assert list(made) == ["tsne", "confusion", "calibration", "abstention"]
    for svg, png in made.values():
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert png.startswith(b"\x89PNG")
