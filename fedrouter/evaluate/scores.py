"""Score answers and average the scores by task, client and adapter; no I/O."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from rouge_score.rouge_scorer import RougeScorer

from fedrouter.evaluate.endpoint import Answer
from fedrouter.types import Record

NO_TASK = "(no task)"
FAILED = "(failed)"


class WordTokenizer:
    """Lower-cased runs of letters and digits.

    Equal to ``rouge_score``'s tokenizer on ASCII text, but keeps letters of other scripts, whose scores would
    otherwise be 0.
    """

    def tokenize(self, text: str) -> list[str]:
        """Return the words of ``text``."""
        return re.findall(r"[^\W_]+", text.lower())


# No stemmer: it supports only English, and other tools use none by default.
_ROUGE = RougeScorer(["rouge1", "rougeL"], use_stemmer=False, tokenizer=WordTokenizer())


@dataclass(frozen=True, slots=True)
class TaggedRecord:
    """A test record and its client."""

    record: Record
    client: str

    @property
    def task(self) -> str:
        """The record's task label, or ``NO_TASK``."""
        return self.record.task or NO_TASK


@dataclass(frozen=True, slots=True)
class Result:
    """One test record's answer and its scores from 0 to 1; all 0 if the endpoint failed."""

    example: TaggedRecord
    answer: Answer
    rouge_1: float  # F1 over words
    rouge_l: float  # F1 over the longest common subsequence of words
    exact_match: float  # 1 if equal up to letter case and white space


@dataclass(frozen=True, slots=True)
class Scores:
    """Mean scores of some results; failed ones count as 0."""

    num_examples: int
    num_failed: int
    rouge_1: float
    rouge_l: float
    exact_match: float


@dataclass(frozen=True, slots=True)
class Routing:
    """The endpoint's own routing of the prompts.

    ``accuracy`` is the share routed to the oracle's adapter, among answered prompts whose task has one; a
    fallback counts as wrong. None if no task has an oracle's adapter.
    """

    confusion: Mapping[str, Mapping[str, int]]  # task → adapter that answered → prompts
    accuracy: float | None
    fallback_rate: float


def score(example: TaggedRecord, answer: Answer) -> Result:
    """Score one answer against the record's completion."""
    if answer.error is not None:
        return Result(example, answer, 0.0, 0.0, 0.0)
    expected = example.record.completion
    rouge = _ROUGE.score(expected, answer.text)
    return Result(
        example,
        answer,
        rouge_1=float(rouge["rouge1"].fmeasure),
        rouge_l=float(rouge["rougeL"].fmeasure),
        exact_match=float(_plain(answer.text) == _plain(expected)),
    )


def mean_scores(results: Sequence[Result]) -> Scores:
    """Average over at least one result."""
    return Scores(
        num_examples=len(results),
        num_failed=sum(result.answer.error is not None for result in results),
        rouge_1=fmean(result.rouge_1 for result in results),
        rouge_l=fmean(result.rouge_l for result in results),
        exact_match=fmean(result.exact_match for result in results),
    )


def mean_over_groups(groups: Mapping[str, Scores]) -> Scores:
    """Average group means with equal weights (macro average)."""
    scores = groups.values()
    return Scores(
        num_examples=sum(group.num_examples for group in scores),
        num_failed=sum(group.num_failed for group in scores),
        rouge_1=fmean(group.rouge_1 for group in scores),
        rouge_l=fmean(group.rouge_l for group in scores),
        exact_match=fmean(group.exact_match for group in scores),
    )


def scores_by(results: Sequence[Result], key: Callable[[Result], str]) -> dict[str, Scores]:
    """Average within groups; names sorted."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[key(result)].append(result)
    return {name: mean_scores(groups[name]) for name in sorted(groups)}


def by_task(result: Result) -> str:
    """Group by task label."""
    return result.example.task


def by_client(result: Result) -> str:
    """Group by client."""
    return result.example.client


def by_adapter(result: Result) -> str:
    """Group by the adapter that answered."""
    return result.answer.adapter or FAILED


def routing(results: Sequence[Result], task_adapters: Mapping[str, str]) -> Routing | None:
    """Summarise routed answers; None if the endpoint routed none of them."""
    routed = [result for result in results if result.answer.routed]
    if not routed:
        return None
    confusion: dict[str, Counter[str]] = defaultdict(Counter)
    for result in routed:
        confusion[by_task(result)][by_adapter(result)] += 1
    judged = [result for result in routed if by_task(result) in task_adapters]
    right = sum(task_adapters[by_task(result)] == result.answer.adapter for result in judged)
    return Routing(
        confusion={task: dict(sorted(confusion[task].items())) for task in sorted(confusion)},
        accuracy=right / len(judged) if judged else None,
        fallback_rate=sum(result.answer.fallback for result in routed) / len(routed),
    )


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
