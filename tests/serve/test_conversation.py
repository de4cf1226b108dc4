"""Which turn of a conversation decides: rules by hand, and a probe file on a trained bundle."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrouter.bundle import Bundle
from fedrouter.embed import load_embedder, routing_text
from fedrouter.models import resolve_base
from fedrouter.serve.bodies import CHAT, conversations
from fedrouter.serve.conversation import MAX_TURNS, MIN_LETTERS, candidates, decide
from fedrouter.serve.routing import NO_TEXT, Routing
from fedrouter.types import Decision, Turn

FILE = Path(__file__).with_name("conversations.jsonl")
PROBES = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def decided(*conversation: str) -> tuple[str, list[list[str]]]:
    """Decide where "task N …" lies within the radius of N and all else beyond; also say what was asked."""
    asked = []

    async def route(texts: Sequence[str]) -> list[Decision]:
        asked.append(list(texts))
        return [
            replace(NO_TEXT, model=text.split()[1], fallback=False)
            if text.startswith("task ")
            else replace(NO_TEXT, model=f"fallback of {text}")
            for text in texts
        ]

    [decision] = asyncio.run(decide([conversation], route))
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
    assert set(found) <= {*turns, ""}
    if len(found) > 1:
        assert all(sum(map(str.isalnum, text)) >= MIN_LETTERS for text in found)


@pytest.fixture(scope="module")
def routing(small_bundle: Bundle) -> Routing:
    base_path = resolve_base(small_bundle.base.model, small_bundle.base.revision)
    return Routing(small_bundle, load_embedder(small_bundle.embedder, small_bundle.base, base_path), str)


@pytest.mark.slow
def test_conversations_keep_their_adapter(routing: Routing) -> None:
    async def ask() -> list[Decision]:
        return [(await decide(conversations(CHAT, probe, str) or [], routing.decide))[0] for probe in PROBES]

    adapters = {task_of(cluster.task_counts): cluster.adapter for cluster in routing.bundle.clusters}
    wrong = [
        (probe["kind"], decision.model, probe["messages"])
        for probe, decision in zip(PROBES, asyncio.run(ask()), strict=True)
        if decision.model != adapters.get(probe["task"], "base")
    ]
    assert len(wrong) <= 0.05 * len(PROBES), wrong  # a bundle of 60 rows a task has wide radii
    # Whether a prompt of no task falls back is the radius's business, not the conversation's.
    assert {kind for kind, *_ in wrong} <= {"longer follow-up", "several follow-ups", "no task"}, wrong


def task_of(counts: Any) -> str:
    return str(max(counts, key=counts.get))


def test_there_are_enough_probes_of_every_task() -> None:
    assert len(PROBES) >= 30
    assert {probe["task"] for probe in PROBES} == {
        *("headline", "dialogue_summary", "paraphrase", "data_to_text", "base")
    }


@pytest.mark.slow
def test_a_conversation_is_embedded_as_a_training_record_is(routing: Routing) -> None:
    embedder = routing.embedder
    for probe in PROBES[::4]:
        turns = [Turn(m["role"], m["content"]) for m in probe["messages"] if isinstance(m["content"], str)]
        if len(turns) < len(probe["messages"]):
            continue
        served = (conversations(CHAT, probe, str) or [])[0][-1]
        trained = routing_text(turns)
        assert served == trained
        np.testing.assert_allclose(
            embedder.embed([served]), embedder.embed(["x y z", trained])[1:], atol=1e-5
        )
