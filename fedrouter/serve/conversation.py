"""Which turn of a conversation decides: a follow-up inherits what an earlier turn decided. No state, no HTTP.

From the last user turn back, the first one decides that says enough and lies within its task cluster's
radius. "yes please" and "in French?" say too little; "make it a bit more formal" lies beyond every radius:
both leave the decision to the turn before. Where no turn lies within, the last one that says enough falls
back.
"""

import re
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice

from fedrouter.types import Decision

MIN_LETTERS = 10  # letters and digits; a turn with fewer says too little to change the adapter
LETTER = re.compile(r"[^\W_]")
MAX_TURNS = 8  # user turns that are looked at: bounds what one request can cost

Route = Callable[[Sequence[str]], Awaitable[list[Decision]]]


def candidates(turns: Sequence[str]) -> list[str]:
    """Return the texts that may decide, the last one first; never empty.

    Parameters
    ----------
    turns : texts of the user turns, in their order.
    """
    enough = islice(filter(_says_enough, reversed(turns)), MAX_TURNS)
    return list(enough) or [turns[-1] if turns else ""]


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
    texts = [candidates(turns) for turns in conversations]
    decisions = await route([first for first, *_ in texts])
    return [
        await _inherited(decision, earlier, route)
        for decision, (_, *earlier) in zip(decisions, texts, strict=True)
    ]


async def _inherited(decision: Decision, earlier: Sequence[str], route: Route) -> Decision:
    if not decision.fallback or not earlier:
        return decision
    return next((one for one in await route(earlier) if not one.fallback), decision)
