"""Texts → decisions, for serving and offline routing; blank texts are not embedded and fall back."""

import math
from collections.abc import Sequence
from dataclasses import replace

from fedrouter.embed import Embedder
from fedrouter.route import BASE_NAME, Router
from fedrouter.types import Decision

NO_TEXT = Decision(
    model=BASE_NAME, cluster="", distance=math.inf, radius=0.0, margin=0.0, fallback=True, distances={}
)
NEAR = 1.25  # × radius: up to this distance a prompt is "just beyond", further away it is "far"


def verdict(decision: Decision) -> str:
    """Describe how far a prompt is from the nearest task cluster."""
    if not decision.cluster:
        return "no text"
    if decision.radius <= 0:
        return "far (radius 0)" if decision.fallback else "within"
    ratio = decision.distance / decision.radius
    how = "far" if ratio > NEAR else "just beyond" if decision.fallback else "within"
    return f"{how} ({ratio:.2f} × radius)"


def difference(first: Decision, second: Decision) -> str:
    """Return how the decision of a second bundle differs: "same", "moved", "rejected" or "accepted".

    Names of task clusters are compared, because a retrained bundle has new adapters for the same tasks.
    "rejected" lies within a radius of the first bundle only, "accepted" within one of the second only.
    """
    if first.fallback != second.fallback:
        return "rejected" if second.fallback else "accepted"
    return "same" if first.fallback or first.cluster == second.cluster else "moved"


def without_text(router: Router) -> Decision:
    """Return the decision for a prompt without text: the fallback; with fallback "nearest" the base model."""
    return replace(NO_TEXT, model=router.beyond or BASE_NAME)


def route_texts(router: Router, embedder: Embedder, texts: Sequence[str]) -> list[Decision]:
    """Decide for each text."""
    decided = iter(router.route(embedder.embed([text for text in texts if text.strip()])))
    return [next(decided) if text.strip() else without_text(router) for text in texts]
