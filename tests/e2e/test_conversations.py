"""Conversations keep their adapter, on a trained bundle and a file of probes; embedded as in training."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrouter.bundle import Bundle
from fedrouter.conversation import route_by_turns
from fedrouter.embed import load_embedder, routing_text
from fedrouter.models import resolve_base
from fedrouter.serve.paths import CHAT
from fedrouter.serve.prompts import conversations
from fedrouter.serve.routing import Routing
from fedrouter.types import Decision, Turn

FILE = Path(__file__).with_name("conversations.jsonl")
PROBES = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
HARD = {"language", "collision"}  # other languages, words of another task: wide radii take some of them in


@pytest.fixture(scope="module")
def routing(small_bundle: Bundle) -> Routing:
    base_path = resolve_base(small_bundle.base.model, small_bundle.base.revision)
    return Routing(small_bundle, load_embedder(small_bundle.embedder, small_bundle.base, base_path), str)


def test_conversations_keep_their_adapter(routing: Routing) -> None:
    async def ask() -> list[Decision]:
        return [
            (await route_by_turns(conversations(CHAT, probe, str) or [], routing.route))[0]
            for probe in PROBES
        ]

    adapters = {task_of(cluster.task_counts): cluster.adapter for cluster in routing.bundle.clusters}
    wrong = [
        (probe["kind"], decision.model, probe["messages"])
        for probe, decision in zip(PROBES, asyncio.run(ask()), strict=True)
        if decision.model != adapters.get(probe["task"], "base")
    ]
    hard = [one for one in wrong if one[0] in HARD]
    others = [one for one in wrong if one[0] not in HARD]
    num_hard = sum(probe["kind"] in HARD for probe in PROBES)
    assert len(others) <= 0.05 * (len(PROBES) - num_hard), others  # a bundle of 60 rows a task has wide radii
    # Whether a prompt of no task falls back is the radius's business, not the conversation's.
    assert {kind for kind, *_ in others} <= {"longer follow-up", "several follow-ups", "no task"}, others
    assert len(hard) <= 0.5 * num_hard, hard


def task_of(counts: Any) -> str:
    return str(max(counts, key=counts.get))


def test_there_are_enough_probes_of_every_task() -> None:
    assert len(PROBES) >= 60
    assert {probe["kind"] for probe in PROBES} >= {
        "no task",
        "collision",
        "several follow-ups",
        "tool",
        "language",
    }
    assert {probe["task"] for probe in PROBES} == {
        *("headline", "dialogue_summary", "paraphrase", "data_to_text", "base")
    }


def test_a_conversation_is_embedded_as_a_training_record_is(routing: Routing) -> None:
    embedder = routing.embedder
    for probe in PROBES[::4]:
        turns = [Turn(m["role"], m["content"]) for m in probe["messages"] if isinstance(m["content"], str)]
        if len(turns) < len(probe["messages"]):
            continue
        served = (conversations(CHAT, probe, str) or [])[0][-1]
        trained = routing_text(turns)
        assert served == trained
        alone, beside = embedder.embed([served])[0], embedder.embed(["x y z", trained])[1]
        assert np.linalg.norm(alone - beside) <= 1e-6 * np.linalg.norm(beside), "a few float32 roundings"
