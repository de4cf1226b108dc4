import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from fedrouter.evaluate.endpoint import Answer
from fedrouter.evaluate.scores import (
    FAILED,
    NO_TASK,
    Result,
    TaggedRecord,
    by_adapter,
    by_client,
    by_task,
    mean_over_groups,
    mean_scores,
    routing,
    score,
    scores_by,
)
from fedrouter.types import Record, Turn


def example(expected: str, task: str | None = "t", client: str = "c") -> TaggedRecord:
    return TaggedRecord(Record((Turn("user", "prompt"),), expected, task), client)


def scored(expected: str, said: str, **tags: Any) -> Result:
    return score(example(expected, **tags), Answer(said, "adapter"))


def routed(task: str, adapter: str | None, *, fallback: bool = False, error: str | None = None) -> Result:
    answer = Answer("", adapter, cluster=task, distance=1.0, fallback=fallback, error=error)
    return score(example("x", task=task), answer)


def test_scores_of_a_hand_computed_pair() -> None:
    # 6 words expected, 4 answered, 3 in common; longest common subsequence: "the cat"
    result = scored("the cat sat on the mat", "the mat? the CAT!")
    assert result.rouge_1 == pytest.approx(2 * (4 / 4) * (4 / 6) / (4 / 4 + 4 / 6))
    assert result.rouge_l == pytest.approx(2 * (2 / 4) * (2 / 6) / (2 / 4 + 2 / 6))
    assert result.exact_match == 0


@given(st.text(string.printable, max_size=60), st.text(string.printable, max_size=60))
def test_rouge_equals_rouge_score_on_ascii(expected: str, said: str) -> None:
    reference = RougeScorer(["rouge1", "rougeL"], use_stemmer=False).score(expected, said)
    result = scored(expected, said)
    assert result.rouge_1 == pytest.approx(reference["rouge1"].fmeasure)
    assert result.rouge_l == pytest.approx(reference["rougeL"].fmeasure)


def test_rouge_knows_other_scripts() -> None:
    assert scored("Москва — столица", "столица").rouge_1 == pytest.approx(2 / 3)
    assert scored("für", "fr").rouge_1 == 0  # words are not split at the umlaut


@pytest.mark.parametrize(("said", "exact"), [(" yes\n", 1), ("YES", 1), ("Yes.", 0), ("", 0)])
def test_exact_match_ignores_case_and_white_space_only(said: str, exact: float) -> None:
    assert scored("Yes", said).exact_match == exact


def test_a_failed_answer_scores_zero() -> None:
    result = score(example(""), Answer("", None, error="timeout"))  # even if nothing was expected
    assert (result.rouge_1, result.rouge_l, result.exact_match) == (0, 0, 0)


def test_means_by_task_client_and_over_tasks() -> None:
    results = [
        scored("a", "a", task="one", client="x"),
        scored("a", "a", task="one", client="y"),
        scored("a", "b", task="one", client="y"),
        scored("a", "b", task=None, client="y"),
    ]
    tasks = scores_by(results, by_task)
    assert {name: scores.exact_match for name, scores in tasks.items()} == {
        NO_TASK: 0,
        "one": pytest.approx(2 / 3),
    }
    clients = scores_by(results, by_client)
    assert {name: scores.num_examples for name, scores in clients.items()} == {"x": 1, "y": 3}
    assert clients["y"].rouge_1 == pytest.approx(1 / 3)
    assert mean_scores(results).rouge_1 == pytest.approx(1 / 2)  # records have equal weights
    assert mean_over_groups(tasks).rouge_1 == pytest.approx(1 / 3)  # tasks have equal weights
    assert mean_over_groups(tasks).num_examples == 4


def test_routing_confusion_accuracy_and_fallback() -> None:
    results = [
        routed("sum", "sum-1"),
        routed("sum", "sum-1"),
        routed("sum", "base", fallback=True),
        routed("title", "sum-1"),
        routed("unseen", "sum-1"),  # its task has no adapter: in the table, not in the accuracy
        score(example("x", task="sum"), Answer("x", "named")),  # not routed: in neither of them
    ]
    found = routing(results, {"sum": "sum-1", "title": "title-1"})
    assert found is not None
    assert found.confusion == {"sum": {"base": 1, "sum-1": 2}, "title": {"sum-1": 1}, "unseen": {"sum-1": 1}}
    assert found.accuracy == pytest.approx(2 / 4)
    assert found.fallback_rate == pytest.approx(1 / 5)


def test_routing_without_known_adapters_or_routed_answers() -> None:
    unknown = routing([routed("sum", "sum-1")], {})
    assert unknown is not None
    assert unknown.accuracy is None
    assert routing([scored("a", "a")], {"t": "adapter"}) is None


def test_failed_answers_are_their_own_group() -> None:
    results = [scored("a", "a"), score(example("a"), Answer("", None, error="timeout"))]
    groups = scores_by(results, by_adapter)
    assert {name: scores.num_failed for name, scores in groups.items()} == {"adapter": 0, FAILED: 1}
