"""A second bundle beside the first: it routes every request too, and answers a share."""

import asyncio
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import write_word_bundle
from echo import DIM, KEY, PATIENT, TASKS, Answer, Server, WordEmbedder
from holder import HolderApp
from prometheus_client import REGISTRY

from fedrouter.bundle import Bundle
from fedrouter.errors import BundleError
from fedrouter.replay import read_log
from fedrouter.serve import canary
from fedrouter.serve.access import Access, Caller
from fedrouter.serve.decision_log import LogOptions
from fedrouter.serve.limits import Limits
from fedrouter.serve.paths import CHAT, DECISIONS, DRY_RUN, MODELS, RELOAD
from fedrouter.serve.routing import Routing
from fedrouter.serve.second import Second
from fedrouter.types import RoutingSpace

FAR = "zebra " * 50


def chat(*turns: str, model: str = "fedrouter") -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": turn} for turn in turns]}


def swapped() -> RoutingSpace:
    """A space in which two task clusters swap places and the third is near zebras only."""
    first, second, _ = TASKS.values()
    centroids = WordEmbedder().embed([second, first, FAR])
    return RoutingSpace(np.zeros(DIM, np.float32), np.eye(DIM, dtype=np.float32), centroids, (0, 1, 2))


def serve_both(
    one: Bundle, two: Bundle, share: float, *, log: LogOptions | None = None, access: Access | None = None
) -> Server:
    app = HolderApp([*one.adapter_paths, *(two.adapter_paths if share else ())])
    routing = Routing(one, WordEmbedder(), str, None, Limits(**PATIENT))
    server = Server(lambda: routing, app, access, log, bundle_root=one.path.parent)
    server.hook._load_second = lambda _, first: Second(first.load_beside(two.path), share)
    return server


@pytest.fixture
def bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Bundle, Bundle]:
    monkeypatch.setattr(canary, "RETRY_S", 0.01)
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    one = write_word_bundle(tmp_path / "one")
    return one, write_word_bundle(tmp_path / "two", seeds=(10, 11, 2), space=swapped())


def counted(difference: str) -> float:
    return sum(
        sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name == "fedrouter_shadow_decisions_total" and sample.labels["difference"] == difference
    )


def test_a_shadow_never_answers_and_its_differences_are_counted(
    bundles: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    one, two = bundles
    log = tmp_path / "log.jsonl"
    kinds = ("same", "moved", "rejected", "accepted", "unknown")
    before = {kind: counted(kind) for kind in kinds}
    asked = [*TASKS.values(), FAR, " "]

    async def scenario() -> tuple[list[Answer], Any]:
        async with serve_both(one, two, 0, log=LogOptions(log)) as server:
            embedder: Any = server.hook.routing.embedder
            answers = [await server.ask(CHAT, chat(text)) for text in asked]
            await asyncio.sleep(0)
            embedded = [text for batch in embedder.batches for text in batch if text in asked]
            assert len(embedded) == 4, "each text is embedded once for both bundles"
            return answers, (await server.ask(DECISIONS, method="GET")).json["decisions"]

    answers, recent = asyncio.run(scenario())
    assert [answer.routing["adapter"].split("-")[0] for answer in answers[:2]] == ["headline", "summary"]
    assert {kind: counted(kind) - before[kind] for kind in kinds} == {
        "same": 1,  # no text: both fall back
        "moved": 2,
        "rejected": 1,
        "accepted": 1,
        "unknown": 0,
    }
    lines = list(read_log(log, pytest.fail))
    assert [line.other and line.other.difference for line in lines] == [
        "moved",
        "moved",
        "rejected",
        "accepted",
        "same",
    ]
    assert recent[-1]["other"]["cluster"] == "summary"


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_canary_answers_its_share_and_keeps_conversations(
    bundles: tuple[Bundle, Bundle], share: float
) -> None:
    one, _ = bundles
    second = Second(Routing(one, WordEmbedder(), str), share)
    first_turns = [f"prompt number {number}" for number in range(4000)]
    chosen = [second.answers([[turn]], Caller()) for turn in first_turns]
    assert sum(chosen) / len(chosen) == pytest.approx(share, abs=0.03)
    assert [second.answers([[turn, "and a follow-up"]], Caller()) for turn in first_turns] == chosen
    assert not second.answers([["x"]], Caller("nobody the bundle knows"))


def test_a_canary_of_everything_answers_with_its_own_adapters(
    bundles: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    one, two = bundles
    digest = hashlib.sha256((two.path / "manifest.json").read_bytes()).hexdigest()
    log = tmp_path / "log.jsonl"

    async def scenario() -> tuple[Answer, Answer, Any, set[str]]:
        async with serve_both(one, two, 1, log=LogOptions(log)) as server:
            while server.hook.state == "starting":
                await asyncio.sleep(0.01)
            assert server.hook.state == "ready"
            answer = await server.ask(CHAT, chat(TASKS["headline"]))
            dry = await server.ask(DRY_RUN, {"prompt": TASKS["headline"]})
            assert dry.json["model"] == answer.json["model"]
            assert dry.json["bundle"] == digest[:12]
            assert dry.json["radii"] == {cluster.name: cluster.radius for cluster in two.clusters}
            write_word_bundle(tmp_path / "three", seeds=(20, 21, 22))
            reloaded = await server.ask(RELOAD, {"bundle": "three"})
            after = await server.ask(CHAT, chat(TASKS["headline"]))
            return answer, after, reloaded.json, set(server.app.adapters)

    answer, after, reloaded, loaded = asyncio.run(scenario())
    wanted = two.clusters[1].adapter  # it lies where headlines are
    assert (answer.status, answer.json["model"]) == (200, wanted)
    assert after.json["model"] == wanted, "a reload replaces the first bundle only"
    assert not set(reloaded["unloaded"]) & set(two.adapter_paths)
    assert set(two.adapter_paths) < loaded
    assert [line.bundle for line in read_log(log, pytest.fail)] == [digest[:12]] * 2


def test_a_tenant_may_name_its_adapters_of_both(tmp_path: Path, bundles: tuple[Bundle, Bundle]) -> None:
    clients = {"headline": ("ann",), "summary": ("bob",), "tâche": ("ann", "bob")}
    one = write_word_bundle(tmp_path / "a", clients=clients)
    two = write_word_bundle(tmp_path / "b", seeds=(10, 11, 12), clients=clients)
    keys = Access(KEY, {hashlib.sha256(b"ann").hexdigest(): "ann"})
    asked = [bundle.clusters[k].adapter for bundle in (one, two) for k in (0, 1)]

    async def scenario(share: float) -> tuple[list[int], set[str]]:
        async with serve_both(one, two, share, access=keys) as server:
            answers = [await server.ask(CHAT, chat("x", model=name), key="ann") for name in asked]
            models = (await server.ask(MODELS, method="GET", key="ann")).json["data"]
            return [answer.status for answer in answers], {card["id"] for card in models}

    statuses, listed = asyncio.run(scenario(0.5))
    assert statuses == [200, 404, 200, 404]
    assert {asked[0], asked[2]} < listed
    assert not {asked[1], asked[3]} & listed
    assert asyncio.run(scenario(0))[0] == [200, 404, 404, 404]


def test_a_second_bundle_of_another_embedder_is_refused(
    bundles: tuple[Bundle, Bundle], tmp_path: Path
) -> None:

    one, _ = bundles
    other = write_word_bundle(tmp_path / "other", embedder=replace(WordEmbedder().spec, max_tokens=64))
    with pytest.raises(BundleError, match="not the one in use"):
        Routing(one, WordEmbedder(), str).load_beside(other.path)
