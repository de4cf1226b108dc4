"""The generator is deterministic, balanced and varied, and train and test share no slot values."""

import re
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrouter.builtin import paraphrase
from fedrouter.builtin.tasks import EXTRA_TASKS, TASKS, generate
from fedrouter.builtin.vocabulary import RANGES, WORDS, Slots, Split, words
from fedrouter.errors import DataError

ALL_TASKS = TASKS + EXTRA_TASKS


def prompts(task: str, split: Split, num_examples: int, seed: int = 0) -> list[str]:
    return [record.turns[0].content for record in generate(task, split, num_examples, seed)]


@pytest.mark.parametrize("task", ALL_TASKS)
def test_records_are_one_user_turn_with_an_answer_and_a_label(task: str) -> None:
    for record in generate(task, "test", 50, 0):
        (turn,) = record.turns
        assert turn.role == "user" and turn.content.strip() and record.completion.strip()
        assert record.task == task
        assert "{" not in turn.content + record.completion


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(ALL_TASKS), st.sampled_from(("train", "test")), st.integers(0, 40), st.integers(0, 2**31)
)
def test_a_larger_number_starts_with_the_same_records(
    task: str, split: Split, num_examples: int, seed: int
) -> None:
    longer = generate(task, split, num_examples + 3, seed)
    assert len(longer) == num_examples + 3
    assert generate(task, split, num_examples, seed) == longer[:num_examples]


@pytest.mark.parametrize("task", ALL_TASKS)
def test_seeds_and_splits_differ(task: str) -> None:
    assert prompts(task, "train", 30, seed=0) != prompts(task, "train", 30, seed=1)
    assert not set(prompts(task, "train", 500)) & set(prompts(task, "test", 500))


@pytest.mark.parametrize("kind", WORDS)
def test_worded_slot_values_are_disjoint(kind: str) -> None:
    train, test = words(kind, "train"), words(kind, "test")
    assert len(set(train)) == len(train) and len(set(test)) == len(test)
    assert not set(train) & set(test)


@pytest.mark.parametrize("task", TASKS)
def test_no_slot_value_occurs_in_both_splits(task: str) -> None:
    """A capitalised word or number in both splits is part of a template."""

    def tokens(split: Split) -> set[str]:
        text = " ".join(f"{r.turns[0].content} {r.completion}" for r in generate(task, split, 600, 0))
        return set(re.findall(r"\b(?:[A-Z][a-z]+|\d+)\b", text))

    values = {value.lower() for kind in WORDS for split in ("train", "test") for value in words(kind, split)}
    shared = tokens("train") & tokens("test")
    assert not {token for token in shared if token.isdigit()}
    assert not {token for token in shared if token.lower() in values}
    assert len(tokens("test") - tokens("train")) > 10


@pytest.mark.parametrize("kind", RANGES)
def test_numbers_are_split_by_three(kind: str) -> None:
    def remainders(split: Split) -> set[int]:
        return {int(Slots(Random(seed), split)[kind]) % 3 for seed in range(100)}

    assert remainders("train") == {1, 2} and remainders("test") == {0}


@pytest.mark.parametrize("num_examples", [2, 7, 100, 1001])
def test_paraphrase_verdicts_are_balanced(num_examples: int) -> None:
    answers = [record.completion for record in generate("paraphrase", "train", num_examples, 3)]
    assert set(answers) == {"same", "other"}
    assert abs(answers.count("same") - answers.count("other")) <= 1
    every_second = answers[::2]
    assert num_examples < 100 or every_second.count("same") > 0.3 * len(every_second)


def test_another_question_differs_in_one_slot_value_and_neither_half_tells() -> None:
    intents = {text: intent for group in paraphrase.GROUPS for intent in group for text in intent}
    patterns = {
        re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[\\w-]+)", re.escape(text))): text for text in intents
    }
    openers = sorted(set(paraphrase.OPENERS), key=len, reverse=True)

    def read(question: str) -> tuple[str, dict[str, str]]:
        for pattern, wording in patterns.items():
            if found := pattern.fullmatch(question):
                return wording, found.groupdict()
        raise AssertionError(question)

    wordings: dict[str, tuple[Counter[str], Counter[str]]] = {
        "same": (Counter(), Counter()),
        "other": (Counter(), Counter()),
    }
    for record in generate("paraphrase", "test", 2000, 0):
        text = record.turns[0].content
        text = text.removeprefix(next(opener for opener in openers if text.startswith(opener)))
        (left, values), (right, values2) = map(read, text.split(" - "))
        assert left != right
        num_different = sum(values[name] != values2[name] for name in values)
        assert num_different == (record.completion == "other"), text
        assert record.completion == "other" or intents[left] == intents[right]
        for counts, wording in zip(wordings[record.completion], (left, right), strict=True):
            counts[wording] += 1
    for same, other in zip(*wordings.values(), strict=True):
        chi_squared = sum((same[w] - other[w]) ** 2 / (same[w] + other[w]) for w in intents)
        assert chi_squared < 106  # five standard deviations above the mean, 54


@pytest.mark.parametrize("task", TASKS)
def test_hundreds_of_surface_forms(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the slot values cut out, only the forms vary."""
    monkeypatch.setattr(Slots, "draw", lambda slots, kind: f"<{slots.rng.random()}>")
    forms = {re.sub(r"<[^>]*>", "_", r.turns[0].content) for r in generate(task, "train", 1500, 0)
             if task != "paraphrase" or r.completion == "same"}  # fmt: skip
    assert len(forms) >= 200


def test_unknown_task_and_negative_number_are_refused() -> None:
    with pytest.raises(DataError, match=r"'paraphrasing'.*paraphrase, data_to_text"):
        generate("paraphrasing", "train", 1, 0)
    with pytest.raises(DataError, match="-1"):
        generate("headline", "train", -1, 0)
