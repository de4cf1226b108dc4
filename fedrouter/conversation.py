"""Routing of conversations: a follow-up inherits the decision of an earlier turn. No state, no HTTP.

The deciding turn is the latest user turn that has enough letters and lies within its task cluster's radius.
"yes please" and "in French?" are too short; "make it a bit more formal" lies beyond every radius: in both
cases an earlier turn decides. If no turn lies within a radius, the latest one with enough letters falls back.
"""

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from itertools import islice

from fedrouter.types import Decision

MIN_LETTERS = 10  # letters and digits; a turn with fewer is too short to decide
LETTER = re.compile(r"[^\W_]")
MAX_TURNS = 8  # user turns that are considered, which bounds the cost of a request

Route = Callable[[Sequence[str]], Awaitable[list[Decision]]]


def candidates(turns: Sequence[str]) -> list[tuple[int, str]]:
    """Return number and text of the turns that may decide, the latest first; never empty.

    Parameters
    ----------
    turns : texts of the user turns, the earliest first.
    """
    numbered = reversed(list(enumerate(turns)))
    long_enough = islice(((number, turn) for number, turn in numbered if _is_long_enough(turn)), MAX_TURNS)
    return list(long_enough) or [(max(len(turns) - 1, 0), turns[-1] if turns else "")]


def _is_long_enough(turn: str) -> bool:
    # Stops at the last letter needed: a turn may be megabytes long.
    return len(list(islice(LETTER.finditer(turn), MIN_LETTERS))) == MIN_LETTERS


async def route_by_turns(conversations: Sequence[Sequence[str]], route: Route) -> list[Decision]:
    """Route each conversation; most need one embedding, those that end in follow-ups a few.

    Parameters
    ----------
    conversations : texts of the user turns of each conversation.
    route : decides for single texts; a blank text falls back.
    """
    candidate_turns = [candidates(turns) for turns in conversations]
    decisions = await route([turns[0][1] for turns in candidate_turns])
    return [
        await _first_inside(decision, turns, route)
        for decision, turns in zip(decisions, candidate_turns, strict=True)
    ]


async def _first_inside(first: Decision, turns: Sequence[tuple[int, str]], route: Route) -> Decision:
    (number, _), *earlier = turns
    if first.fallback and earlier:
        for (turn, _), decision in zip(earlier, await route([text for _, text in earlier]), strict=True):
            if not decision.fallback:
                return replace(decision, turn=turn)
    return replace(first, turn=number) if number else first
