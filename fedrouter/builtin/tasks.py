"""The built-in tasks: a seeded generator of any number of records.

``TASKS`` mirror the paper's four and make up ``builtin:four-tasks``; ``EXTRA_TASKS`` are for studies of
routing among many tasks.
"""

import random
from collections.abc import Callable

from fedrouter.builtin import data_to_text, dialogue, extra, headline, paraphrase
from fedrouter.builtin.vocabulary import Slots, Split
from fedrouter.errors import DataError
from fedrouter.types import Record, Turn

TASKS = ("paraphrase", "data_to_text", "dialogue_summary", "headline")
EXTRA_TASKS = tuple(extra.EXAMPLES)

_EXAMPLES: dict[str, Callable[[Slots], tuple[str, str]]] = {
    "data_to_text": data_to_text.example,
    "dialogue_summary": dialogue.example,
    "headline": headline.example,
    **extra.EXAMPLES,
}


def generate(task: str, split: Split, num_examples: int, seed: int) -> list[Record]:
    """Generate a task's records; a larger number starts with the same records.

    Train and test share no slot values (names, places, objects, numbers). Paraphrase verdicts are balanced.

    Raises
    ------
    DataError
        If the task is unknown or ``num_examples`` is negative.
    """
    if task != "paraphrase" and task not in _EXAMPLES:
        known = ", ".join((*TASKS, *EXTRA_TASKS))
        raise DataError(f"unknown built-in task {task!r}: choose one of {known}")
    if num_examples < 0:
        raise DataError(f"cannot generate {num_examples} examples of {task}: ask for 0 or more")
    return [_record(task, split, seed, index) for index in range(num_examples)]


def _record(task: str, split: Split, seed: int, index: int) -> Record:
    slots = Slots(random.Random(f"{task}/{split}/{seed}/{index}"), split)
    if task == "paraphrase":
        # Each verdict once in every two records, in random order.
        flip = random.Random(f"{task}/{split}/{seed}/pair/{index // 2}").random() < 0.5
        prompt, completion = paraphrase.example(slots, same=(index % 2 == 0) != flip)
    else:
        prompt, completion = _EXAMPLES[task](slots)
    return Record((Turn("user", prompt),), completion, task)
