"""A bundle over letters: task "a" near the letter a, task "b" near b, and an untrained task."""

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import fakes
import numpy as np
import pytest
from rich.console import Console

from fedrouter.bundle import Bundle
from fedrouter.errors import DataError
from fedrouter.evaluate import TaggedRecord
from fedrouter.evaluate.offline import evaluate_routing, render, stated_quantile, write_json
from fedrouter.types import Record, TaskCluster, Turn

TEXTS = {
    "a": ["aaaa", "aaa", "aaaabb", "bbb"],  # distances 0, 1, 2 from (4, 0); the last is nearer to b
    "b": ["bbbb", "bbb"],
    "code": ["cccccccc", "hhhhhhh"],
}


def bundle(path: Path, labelled: bool = True, more: Mapping[str, int] = MappingProxyType({})) -> Bundle:
    """Return a bundle; ``more`` are rows of further tasks in both task clusters."""
    centroids = np.zeros((2, fakes.DIM))
    centroids[0, 0] = centroids[1, 1] = 4
    clusters = [
        TaskCluster(f"{t}-cluster", "", 10, ("c",), {t: 8, **more} if labelled else {}, radius=1.5)
        for t in "ab"
    ]
    return fakes.write(path, fakes.space(centroids), [1.5, 1.5], clusters=clusters)


def records(tasks: str = "a b code") -> list[TaggedRecord]:
    return [
        TaggedRecord(Record((Turn("user", text),), "x", task), "c")
        for task in tasks.split()
        for text in TEXTS[task]
    ]


def test_shares_are_counted_by_hand(tmp_path: Path) -> None:
    report = evaluate_routing(bundle(tmp_path / "b"), fakes.LetterEmbedder(), records(), stated=0.97)
    a, b, code = (report.by_task[t] for t in ("a", "b", "code"))
    assert (a.accuracy, a.within, a.confusion) == (0.75, 0.75, {"a-cluster": 3, "b-cluster": 1})
    assert (b.accuracy, b.within, b.confusion) == (1.0, 1.0, {"b-cluster": 2})
    assert (code.known, code.accuracy, code.within) == (False, None, 0.0)
    assert report.accuracy == pytest.approx((0.75 + 1) / 2)  # tasks have equal weights
    assert report.within == pytest.approx((0.75 + 1) / 2)
    assert report.auroc == 1.0
    steps = {step.factor: step for step in report.curve}
    assert steps[0.5].known_rejected == pytest.approx((0.75 + 0.5) / 2)
    assert steps[1.0].unknown_rejected == 1.0
    assert steps[1.0].answered_right == pytest.approx((2 / 4 + 2 / 2) / (3 / 4 + 2 / 2))


@pytest.mark.parametrize(("num", "accuracy"), [(2, 0.0), (8, 1.0)])
def test_a_trained_task_without_a_task_cluster_of_its_own_is_known(
    num: int, accuracy: float, tmp_path: Path
) -> None:
    """A client that trains alone has one task cluster for its tasks, often with equally many rows."""
    merged = bundle(tmp_path / "b", more={"code": num})
    report = evaluate_routing(merged, fakes.LetterEmbedder(), records())
    assert report.by_task["code"].known
    assert report.by_task["code"].accuracy == accuracy
    assert report.auroc is None


def test_without_unknown_tasks_there_is_nothing_to_tell_apart(tmp_path: Path) -> None:
    report = evaluate_routing(bundle(tmp_path / "b"), fakes.LetterEmbedder(), records("a b"))
    assert report.auroc is None
    assert {step.unknown_rejected for step in report.curve} == {None}


def test_without_known_tasks_no_share_of_them_is_shown(tmp_path: Path) -> None:
    report = evaluate_routing(bundle(tmp_path / "b"), fakes.LetterEmbedder(), records("code"))
    assert {step.known_rejected for step in report.curve} == {None}
    Console(file=(shown := io.StringIO()), width=120).print(render(report))
    assert "0.0%" not in shown.getvalue().split("abstention")[1].splitlines()[4].split("│")[2]


def test_what_cannot_be_judged_is_refused(tmp_path: Path) -> None:
    labelled, bare = bundle(tmp_path / "b"), bundle(tmp_path / "c", labelled=False)
    unlabelled = [TaggedRecord(Record((Turn("user", "a"),), "x", where="a.jsonl:3"), "c")]
    for which, what, reason in (
        (labelled, [], "no records"),
        (labelled, unlabelled, r"missing in 1 of 1, first in a.jsonl:3"),
        (bare, records(), "without task labels"),
    ):
        with pytest.raises(DataError, match=reason):
            evaluate_routing(which, fakes.LetterEmbedder(), what)


def test_brackets_in_a_task_are_no_markup(tmp_path: Path) -> None:
    odd = [replace(r, record=replace(r.record, task=f"[/b] {r.task} [bold]x[/bold]")) for r in records()]
    report = evaluate_routing(bundle(tmp_path / "b"), fakes.LetterEmbedder(), odd)
    Console(file=(shown := io.StringIO()), width=120).print(render(report))
    assert "[/b] code [bold]x[/bold]" in shown.getvalue()


def test_the_report_is_shown_and_written(tmp_path: Path) -> None:
    report = evaluate_routing(bundle(tmp_path / "b"), fakes.LetterEmbedder(), records(), stated=0.97)
    Console(file=(shown := io.StringIO()), width=120).print(render(report))
    assert "in radius: 87.5%, stated 97.0%" in shown.getvalue()
    write_json(report, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["by_task"]["b"]["accuracy"] == 1.0


@pytest.mark.parametrize(("slack", "stated"), [(1.0, 0.97), (1.5, None)])
def test_a_run_says_what_its_radii_hold_unless_they_were_widened(
    tmp_path: Path, slack: float, stated: float | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"routing": {"quantile": 0.97, "slack": slack}}))
    assert stated_quantile(tmp_path / "bundle") == stated
    assert stated_quantile(tmp_path / "elsewhere" / "bundle") is None
