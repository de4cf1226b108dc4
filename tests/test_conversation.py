"""The deciding turn of a conversation, with decisions by hand; tests/e2e uses a trained bundle."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from fedrouter.conversation import MAX_TURNS, MIN_LETTERS, candidates, route_by_turns
from fedrouter.decide import NO_TEXT
from fedrouter.types import Decision


def decided(*conversation: str) -> tuple[str, list[list[str]]]:
    """Return the model decided for a conversation, and the routed texts of each call.

    "task N …" lies within the radius of N, all other texts beyond every radius.
    """
    asked = []

    async def route(texts: Sequence[str]) -> list[Decision]:
        asked.append(list(texts))
        return [
            replace(NO_TEXT, model=text.split()[1], fallback=False)
            if text.startswith("task ")
            else replace(NO_TEXT, model=f"fallback of {text}")
            for text in texts
        ]

    [decision] = asyncio.run(route_by_turns([conversation], route))
    if conversation:
        assert conversation[decision.turn].removeprefix("task ")[0] == decision.model.split(" of ")[-1][0]
    return decision.model, asked


def test_the_last_turn_that_lies_within_decides() -> None:
    one, two, far, short = (
        "task 1 and more words",
        "task 2 and more words",
        "something else entirely",
        "ok then",
    )
    assert decided(one) == ("1", [[one]])
    assert decided(one, two) == ("2", [[two]])
    assert decided(one, far) == ("1", [[far], [one]])
    assert decided(one, short) == ("1", [[one]])
    assert decided(one, two, short, far) == ("2", [[far], [two, one]])
    assert decided(far, "some other text") == ("fallback of some other text", [["some other text"], [far]])
    assert decided(far, short) == (f"fallback of {far}", [[far]])
    assert decided(short, "task 3") == ("3", [["task 3"]]), "with nothing else to go by, a short turn decides"
    assert decided() == ("fallback of ", [[""]])


@given(st.lists(st.text(), max_size=30))
def test_candidates_are_few_and_never_none(turns: list[str]) -> None:
    found = candidates(turns)
    assert 1 <= len(found) <= MAX_TURNS
    assert found == ([(n, turns[n]) for n, _ in found] if turns else [(0, "")])
    if len(found) > 1:
        assert all(sum(map(str.isalnum, text)) >= MIN_LETTERS for _, text in found)
