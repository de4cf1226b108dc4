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
NEAR = 1.25  # × radius: up to there a prompt is said to lie just beyond


def verdict(decision: Decision) -> str:
    """Say in a few words how a prompt lies to the nearest task cluster."""
    if not decision.cluster:
        return "no text"
    if decision.radius <= 0:
        return "far (radius 0)" if decision.fallback else "within"
    ratio = decision.distance / decision.radius
    how = "far" if ratio > NEAR else "just beyond" if decision.fallback else "within"
    return f"{how} ({ratio:.2f} × radius)"


def difference(first: Decision, second: Decision) -> str:
    """Say how the decision of a second bundle differs: "same", "moved", "rejected" or "accepted".

    Task clusters are compared, by name: a bundle trained anew has other adapters for the same tasks.
    "rejected" is what lies within a radius of the first bundle alone, "accepted" of the second alone.
    """
    if first.fallback != second.fallback:
        return "rejected" if second.fallback else "accepted"
    return "same" if first.fallback or first.cluster == second.cluster else "moved"


def without_text(router: Router) -> Decision:
    """Return what is decided without a text to route by: as beyond a radius, the base for the nearest."""
    return replace(NO_TEXT, model=router.beyond or BASE_NAME)


def decide(router: Router, embedder: Embedder, texts: Sequence[str]) -> list[Decision]:
    """Decide for each text, as a server with this bundle does."""
    decided = iter(router.route(embedder.embed([text for text in texts if text.strip()])))
    return [next(decided) if text.strip() else without_text(router) for text in texts]
