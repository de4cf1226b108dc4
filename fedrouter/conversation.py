"""Which turn of a conversation decides: a follow-up inherits what an earlier turn decided. No state, no HTTP.

From the last user turn back, the first one decides that says enough and lies within its task cluster's
radius. "yes please" and "in French?" say too little; "make it a bit more formal" lies beyond every radius:
both leave the decision to the turn before. Where no turn lies within, the last one that says enough falls
back.
"""

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from itertools import islice

from fedrouter.types import Decision

MIN_LETTERS = 10  # letters and digits; a turn with fewer says too little to change the adapter
LETTER = re.compile(r"[^\W_]")
MAX_TURNS = 8  # user turns that are looked at: bounds what one request can cost

Route = Callable[[Sequence[str]], Awaitable[list[Decision]]]


def candidates(turns: Sequence[str]) -> list[tuple[int, str]]:
    """Return number and text of the turns that may decide, the last one first; never empty.

    Parameters
    ----------
    turns : texts of the user turns, in their order.
    """
    numbered = reversed(list(enumerate(turns)))
    enough = islice((one for one in numbered if _says_enough(one[1])), MAX_TURNS)
    return list(enough) or [(max(len(turns) - 1, 0), turns[-1] if turns else "")]


def _says_enough(turn: str) -> bool:
    """Look no further than needed: a turn may be megabytes long."""
    return len(list(islice(LETTER.finditer(turn), MIN_LETTERS))) == MIN_LETTERS


async def decide(conversations: Sequence[Sequence[str]], route: Route) -> list[Decision]:
    """Decide for each conversation; most cost one embedding, one that goes on with follow-ups a few.

    Parameters
    ----------
    conversations : texts of the user turns of each.
    route : decides for single texts; a blank one falls back.
    """
    asked = [candidates(turns) for turns in conversations]
    decisions = await route([own[0][1] for own in asked])
    return [await _settled(*one, route) for one in zip(decisions, asked, strict=True)]


async def _settled(first: Decision, asked: Sequence[tuple[int, str]], route: Route) -> Decision:
    (number, _), *earlier = asked
    if first.fallback and earlier:
        for (turn, _), decision in zip(earlier, await route([text for _, text in earlier]), strict=True):
            if not decision.fallback:
                return replace(decision, turn=turn)
    return replace(first, turn=number) if number else first
