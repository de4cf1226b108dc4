"""Descriptions of decisions, and differences between two of them."""

from dataclasses import replace

import pytest

from fedrouter.decide import NO_TEXT, difference, verdict
from fedrouter.types import Decision

WITHIN = Decision("a-1", "a", 2.0, 4.0, 1.0, False, {"a": 2.0})


@pytest.mark.parametrize(
    ("distance", "radius", "words"),
    [
        (2.0, 4.0, "within (0.50 × radius)"),
        (4.0, 4.0, "within (1.00 × radius)"),
        (4.32, 4.0, "just beyond (1.08 × radius)"),
        (5.0, 4.0, "just beyond (1.25 × radius)"),
        (5.1, 4.0, "far (1.27 × radius)"),
        (0.1, 0.0, "far (radius 0)"),
    ],
)
def test_a_verdict_says_how_far(distance: float, radius: float, words: str) -> None:
    found = replace(WITHIN, distance=distance, radius=radius, fallback=distance > radius)
    assert verdict(found) == words


def test_no_text_is_no_distance() -> None:
    assert verdict(NO_TEXT) == "no text"


def test_decisions_differ_by_task_cluster_and_fallback() -> None:
    other, anew = replace(WITHIN, cluster="b"), replace(WITHIN, model="a-2")
    beyond = replace(WITHIN, fallback=True)
    assert difference(WITHIN, anew) == "same"
    assert difference(WITHIN, other) == "moved"
    assert difference(WITHIN, beyond) == "rejected"
    assert difference(beyond, WITHIN) == "accepted"
    assert difference(beyond, replace(beyond, cluster="b")) == "same", "nobody's either way"
