"""Texts to decisions, for serving and offline alike: what has no text is not embedded, and falls back."""

import math
from collections.abc import Sequence
from dataclasses import replace

from fedrouter.embed import Embedder
from fedrouter.route import BASE_NAME, Router
from fedrouter.types import Decision

NO_TEXT = Decision(
    model=BASE_NAME, cluster="", distance=math.inf, radius=0.0, margin=0.0, fallback=True, distances={}
)


def without_text(router: Router) -> Decision:
    """Return what is decided without a text to route by: as beyond a radius, the base for the nearest."""
    return replace(NO_TEXT, model=router.beyond or BASE_NAME)


def decide(router: Router, embedder: Embedder, texts: Sequence[str]) -> list[Decision]:
    """Decide for each text, as a server with this bundle does."""
    decided = iter(router.route(embedder.embed([text for text in texts if text.strip()])))
    return [next(decided) if text.strip() else without_text(router) for text in texts]
