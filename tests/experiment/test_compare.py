"""Means, the best baseline, the paired bootstrap, and reports with them."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from made_up import TASKS, lines_of, settings_of

from fedrouter.errors import DataError
from fedrouter.experiment.compare import Asked, Results, Scores, baselines, best, drawn_gains, gain, native
from fedrouter.experiment.report import claims, show_report, write_report
from fedrouter.experiment.tables import Table, scores, tidy

METHODS = ["fedrouter", "fedavg", "local", "oracle"]
NAMESPACES = {f"http://www.w3.org/{name}" for name in ("2000/svg", "1999/xlink")}
SETTINGS = settings_of(METHODS, [1, 2, 3])


def mean(scenario: str, method: str, evaluation: str) -> float:
    if method == "local":
        return 0.4 if evaluation != "local/all" else 0.2
    return {"fedrouter": 0.5, "oracle": 0.5, "fedavg": 0.45}[method]


LINES = lines_of(SETTINGS, mean)
RESULTS = Results(LINES.values())


def test_a_score_is_the_mean_over_tasks_then_over_seeds() -> None:
    found = RESULTS.scores("w", "single", Asked("local", "local", "all"))
    assert found is not None
    by_hand = [
        np.mean([np.mean(LINES[f"w/single/local/{s}"]["scores"]["local/all"]["prompts"][t]) for t in TASKS])
        for s in (1, 2, 3)
    ]
    assert found.mean == pytest.approx(np.mean(by_hand))
    assert found.spread == pytest.approx(np.std(by_hand, ddof=1))
    assert RESULTS.scores("w", "single", Asked("clustered", "local", "all")) is None


def test_pairing_takes_out_what_is_alike_for_both() -> None:
    found = gain(
        RESULTS, "w", "dual", native("fedrouter", "own", SETTINGS), native("fedavg", "own", SETTINGS)
    )
    assert found is not None
    assert found.gain == pytest.approx(0.05 / 0.45, rel=0.05)
    assert found.low < found.gain < found.high
    assert found.sure, "prompts vary by as much as the methods differ, but alike"
    same = gain(RESULTS, "w", "dual", native("oracle", "own", SETTINGS), native("fedrouter", "own", SETTINGS))
    assert same is not None
    assert not same.sure


def test_only_seeds_that_both_have_are_compared() -> None:
    some = Results(line for key, line in LINES.items() if key != "w/dual/fedavg/3")
    found = gain(some, "w", "dual", native("fedrouter", "own", SETTINGS), native("fedavg", "own", SETTINGS))
    assert found is not None
    assert found.num_seeds == 2


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    draw, hits = np.random.default_rng(0), 0
    for _ in range(60):
        prompts = draw.normal(0, 0.1, (2, 5, 40))
        a, b = (
            Scores(tuple(range(5)), (level + own,)) for level, own in zip((0.55, 0.5), prompts, strict=True)
        )
        low, high = np.percentile(drawn_gains(a, b, 400), [2.5, 97.5])
        hits += low <= 0.1 <= high
    assert hits >= 50


def test_baselines_answer_as_published_and_behind_a_router() -> None:
    assert [a.method for a in baselines(SETTINGS, "w", "own", routed=False)] == ["fedavg", "local"]
    assert Asked("local", "global", "own") in baselines(SETTINGS, "w", "own", routed=True)
    found = best(RESULTS, "w", "dual", baselines(SETTINGS, "w", "own", routed=True))
    assert found == native("fedavg", "own", SETTINGS)


def test_claims_are_judged() -> None:
    rows = {row[0]: row[1:] for row in claims(SETTINGS, RESULTS).rows}
    measured, wanted, reached = rows["w: single, all tests, over `local`, each client with its own adapter"]
    assert 140 < float(measured.split("%")[0]) < 160
    assert (wanted, reached) == ("≥ +136%", "yes")
    assert all(row[2] != "**no**" for row in rows.values())
    worse = Results(lines_of(SETTINGS, lambda s, m, e: 0.4 if m == "fedrouter" else 0.5).values())
    assert claims(SETTINGS, worse).markdown().count("**no**") >= 5


def test_points_of_exact_match_are_claimed_where_that_is_the_metric() -> None:
    settings = settings_of(METHODS, [1, 2], "exact_match")
    text = claims(settings, Results(lines_of(settings, mean).values())).markdown()
    assert "+5.0 | ≥ +3 | yes" in text


def test_a_table_says_how_each_was_asked() -> None:
    rows = [row[0] for row in scores(SETTINGS, RESULTS, "w", "dual").rows]
    assert rows == ["fedrouter", "fedrouter, local routing", "fedavg", "local", "local, routed",
                    "oracle", "oracle, local routing"]  # fmt: skip


def test_latex_is_escaped() -> None:
    text = Table("t", ["a_b", "c"], [["1 ± 2", "+5 %"]]).latex()
    assert r"a\_b" in text
    assert r"$\pm$" in text
    assert r"\%" in text


def test_the_tidy_file_has_a_line_a_task_and_evaluation() -> None:
    lines = tidy(RESULTS).splitlines()
    assert len(lines) == 1 + len(LINES) * 4 * len(TASKS)
    assert lines[0].startswith("world,scenario,method,seed,routing,tests,task,rouge_1")


def test_a_report_has_tables_and_pictures_that_are_svg(tmp_path: Path) -> None:
    LINES["w/dual/fedrouter/1"]["map"] = [[0.0, 1.0, "one", "a"], [1.0, 0.0, "two & <b>", "b"]]
    write_report(SETTINGS, LINES, tmp_path)
    names = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert names == {"w-tasks", "w-bytes", "w-loss", "w-curve", "w-map"}
    for path in (tmp_path / "figures").glob("*.svg"):
        assert ET.parse(path).getroot().tag.endswith("svg")
    page = (tmp_path / "report.md").read_text()
    assert page.startswith("## What the paper claims")
    assert all(f"figures/{name}.svg" in page for name in names)
    html = (tmp_path / "report.html").read_text()
    assert html.count("<svg") == len(names)
    assert "two &amp; &lt;b&gt;" in html
    assert set(re.findall(r"https?://[^\"\s]+", html)) <= NAMESPACES, "needs no other host"
    assert (tmp_path / "tables.tex").read_text().count(r"\begin{tabular}") >= 4


def test_a_report_is_made_again_from_what_a_directory_holds(tmp_path: Path) -> None:
    write_report(SETTINGS, LINES, tmp_path)
    with pytest.raises(DataError, match="not the directory of an experiment"):
        show_report(tmp_path / "figures")
    before = (tmp_path / "report.md").read_text()
    (tmp_path / "report.html").unlink()
    assert show_report(tmp_path).is_file()
    assert (tmp_path / "report.md").read_text() == before
