"""Recorded decisions: in memory and in the log, who may see them, and a log that is replayed."""

import asyncio
import hashlib
import json
import stat
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import write_word_bundle
from echo import DIM, KEY, TASKS, Answer, Server, WordEmbedder
from prometheus_client import REGISTRY

from fedrouter.bundle import Bundle
from fedrouter.errors import DataError, ServingError
from fedrouter.replay import read_log, replay
from fedrouter.serve.access import Access
from fedrouter.serve.decision_log import DecisionLog, LogOptions
from fedrouter.serve.paths import CHAT, COMPLETIONS, DECISIONS, FEEDBACK
from fedrouter.types import RoutingSpace

FAR = "zebra " * 50
TENANTS = {hashlib.sha256(name.encode()).hexdigest(): name for name in ("ann", "bob")}


def chat(*turns: str) -> dict[str, Any]:
    return {"model": "fedrouter", "messages": [{"role": "user", "content": turn} for turn in turns]}


def within(server: Server, *requests: tuple[str, Any, dict[str, Any]]) -> list[Answer]:
    async def all_of_them() -> list[Answer]:
        async with server:
            return [await server.ask(path, body, **options) for path, body, options in requests]

    return asyncio.run(all_of_them())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_decision_is_a_line_and_no_word_of_its_prompt(
    make_server: Callable[..., Server], word_bundle: Bundle, tmp_path: Path
) -> None:
    log = tmp_path / "decisions.jsonl"
    prompts = [TASKS["summary"], TASKS["headline"], FAR]
    answers = within(
        make_server(log=LogOptions(log)),
        (CHAT, chat(TASKS["summary"]), {}),
        (CHAT, chat(TASKS["headline"], FAR), {"headers": {"x-fedrouter-client": "a"}}),
        (COMPLETIONS, {"model": "fedrouter", "prompt": prompts}, {}),
        (COMPLETIONS, {"model": "fedrouter", "prompt": " "}, {}),
        (COMPLETIONS, {"model": word_bundle.clusters[0].adapter, "prompt": "x"}, {}),
    )
    ids = [answer.routing.get("id") for answer in answers]
    assert ids[4] is None, "a request that names an adapter is not routed"
    assert len(set(ids)) == 5
    found = lines(log)
    assert [line["id"] for line in found] == [ids[0], ids[1], *[ids[2]] * 3, ids[3]]
    assert [line["cluster"] for line in found[:4]] == ["summary", "headline", "summary", "headline"]
    assert [line["prompt"] for line in found] == [0, 0, 0, 1, 2, 0]
    assert [line["reason"] for line in found] == ["", "", "", "", "radius", "no_text"]
    assert (found[1]["caller"], found[1]["turn"], found[1]["turns"]) == ("a", 0, 2)
    assert found[5]["distance"] is None
    for answer, line in zip(answers[:2], found, strict=False):
        assert answer.routing["adapter"] == line["adapter"]
        assert float(answer.routing["margin"]) == pytest.approx(line["margin"], rel=1e-4)
        assert float(answer.routing["routing-ms"]) == pytest.approx(line["routing_ms"], abs=1e-3)
    text = log.read_text()
    assert not [word for prompt in prompts for word in prompt.split() if f"{word} " in text]
    assert "texts" not in text and "vectors" not in text
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_texts_and_vectors_are_logged_only_by_option(
    make_server: Callable[..., Server], tmp_path: Path
) -> None:
    log = tmp_path / "decisions.jsonl"
    turns = TASKS["summary"], FAR, "ok"
    within(make_server(log=LogOptions(log, prompts=True, vectors=True)), (CHAT, chat(*turns), {}))
    [line] = read_log(log, pytest.fail)
    assert line.texts == (FAR, TASKS["summary"])
    [far, near] = line.vectors or ()
    assert far is not None and near is not None
    assert len(far) == 4 * -(-DIM * 2 // 3)
    assert line.turn == 0


@pytest.mark.parametrize("kept", ["prompts", "vectors"])
def test_replay_with_the_same_bundle_decides_the_same(
    make_server: Callable[..., Server], word_bundle: Bundle, tmp_path: Path, kept: str
) -> None:
    log = tmp_path / "decisions.jsonl"
    requests: list[Any] = [(CHAT, chat(text), {}) for text in [*TASKS.values(), FAR, " "]]
    requests.append((CHAT, chat(TASKS["headline"], FAR), {}))
    within(make_server(log=LogOptions(log, **{kept: True})), *requests)
    found = replay(log, word_bundle, WordEmbedder())
    assert (found.num_decided, found.total("same"), found.num_skipped) == (6, 6, {})


@pytest.mark.parametrize("kept", ["prompts", "vectors"])
def test_replay_with_another_bundle_decides_differently(
    make_server: Callable[..., Server], tmp_path: Path, kept: str
) -> None:
    log, embedder = tmp_path / "decisions.jsonl", WordEmbedder()
    requests: list[Any] = [(CHAT, chat(text), {}) for text in [*TASKS.values(), TASKS["summary"], FAR]]
    within(make_server(log=LogOptions(log, **{kept: True})), *requests)
    first, second, _ = TASKS.values()
    centroids = embedder.embed([second, first, FAR])  # two task clusters swap places, the third moves away
    space = RoutingSpace(np.zeros(DIM, np.float32), np.eye(DIM, dtype=np.float32), centroids, (0, 1, 2))
    found = replay(log, write_word_bundle(tmp_path / "other", space=space), embedder).to_json()
    assert (found["moved"], found["rejected"], found["accepted"], found["same"]) == (3, 1, 1, 0)
    assert found["by_cluster"]["summary"] == {"moved": 2, "accepted": 1}, "the far prompt is nearest to it"
    assert found["moved_to"][0] == {"from": "summary", "to": "headline", "decisions": 2}


def test_a_log_without_texts_and_vectors_cannot_be_replayed(
    make_server: Callable[..., Server], word_bundle: Bundle, tmp_path: Path
) -> None:
    log = tmp_path / "decisions.jsonl"
    within(make_server(log=LogOptions(log)), (CHAT, chat(TASKS["summary"]), {}))
    with pytest.raises(DataError, match="--log-vectors or --log-prompts"):
        replay(log, word_bundle, WordEmbedder())
    with pytest.raises(DataError, match="no such file"):
        replay(tmp_path / "none", word_bundle, WordEmbedder())
    log.write_text("{}\n")
    with pytest.raises(DataError, match="line 1: not a line of a decision log"):
        replay(log, word_bundle, WordEmbedder())


def test_decisions_that_the_log_cannot_replay_are_skipped_and_counted(
    make_server: Callable[..., Server], word_bundle: Bundle, tmp_path: Path
) -> None:
    """The last turn decided. A bundle that rejects it needs the turn before, which was never embedded."""
    log = tmp_path / "decisions.jsonl"
    conversation = TASKS["headline"], TASKS["summary"]
    within(make_server(log=LogOptions(log, vectors=True)), (CHAT, chat(*conversation), {}))
    embedder = WordEmbedder()
    space = RoutingSpace(
        np.zeros(DIM, np.float32), np.eye(DIM, dtype=np.float32), embedder.embed([FAR, FAR, FAR]), (0, 1, 2)
    )
    found = replay(log, write_word_bundle(tmp_path / "other", space=space), embedder)
    assert found.num_decided == 0
    assert found.num_skipped == {"an earlier turn would decide, but its vector is not in the log": 1}


def test_vectors_of_another_embedder_of_the_same_dimension_are_skipped(
    make_server: Callable[..., Server], word_bundle: Bundle, tmp_path: Path
) -> None:
    log = tmp_path / "decisions.jsonl"
    within(make_server(log=LogOptions(log, vectors=True)), (CHAT, chat(TASKS["summary"]), {}))
    digest = word_bundle.embedder.digest
    assert digest in log.read_text()
    log.write_text(log.read_text().replace(digest, "0" * 12))
    found = replay(log, word_bundle, WordEmbedder())
    assert (found.num_decided, found.num_skipped) == (0, {"vectors of another embedder": 1})


def test_files_are_rotated_and_read_in_their_order(tmp_path: Path) -> None:
    log = DecisionLog(LogOptions(tmp_path / "log.jsonl", max_mib=0.001))
    for number in range(40):
        log.write(partial(dict, n=number, filler="x" * 100))
    log.close()
    older = sorted(tmp_path.glob("log.jsonl.*"), key=lambda path: -int(path.suffix[1:]))
    assert len(older) > 2
    assert all(path.stat().st_size <= 1100 for path in [*older, tmp_path / "log.jsonl"])
    kept = [line["n"] for path in [*older, tmp_path / "log.jsonl"] for line in lines(path)]
    assert kept == list(range(40))


def test_a_full_disk_loses_lines_but_no_response(make_server: Callable[..., Server]) -> None:
    before = REGISTRY.get_sample_value("fedrouter_decision_log_lost_total") or 0
    requests: list[Any] = [(CHAT, chat(TASKS["summary"]), {})] * 3
    answers = within(make_server(log=LogOptions(Path("/dev/full"))), *requests)
    assert [answer.status for answer in answers] == [200] * 3
    assert REGISTRY.get_sample_value("fedrouter_decision_log_lost_total") == before + 3


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="No such file or directory"):
        DecisionLog(LogOptions(tmp_path / "none" / "log.jsonl"))
    with pytest.raises(ServingError, match="above 0"):
        LogOptions(tmp_path / "log.jsonl", max_mib=0)


def test_feedback_is_attached_to_a_request(
    make_server: Callable[..., Server], adapter_of: Callable[[str], str], tmp_path: Path
) -> None:
    log = tmp_path / "decisions.jsonl"
    counted = {"adapter": adapter_of("summary"), "outcome": "bad"}
    before = REGISTRY.get_sample_value("fedrouter_feedback_total", counted) or 0

    async def scenario() -> list[Answer]:
        async with make_server(log=LogOptions(log)) as server:
            key = (await server.ask(CHAT, chat(TASKS["summary"]))).routing["id"]
            payloads = [{"id": key, "outcome": "bad"}, {"id": key, "outcome": "dreadful"}, {"id": "0"}, {}]
            payloads += [{"id": "0" * 32, "outcome": "good"}]
            answers = [await server.ask(FEEDBACK, one) for one in payloads]
            return [*answers, await server.ask(DECISIONS, method="GET")]

    answers = asyncio.run(scenario())
    assert [answer.status for answer in answers] == [200, 400, 400, 400, 404, 200]
    assert answers[0].json["adapters"] == [adapter_of("summary")]
    assert answers[0].json["logged"] is True
    assert '"outcome": "good or bad"' in answers[1].json["error"]["message"]
    assert answers[5].json["decisions"][0]["feedback"] == "bad"
    assert answers[5].json["decisions"][0]["outcome"] == "ok"
    decided, fed = lines(log)
    assert (fed["feedback"], fed["outcome"]) == (decided["id"], "bad")
    assert REGISTRY.get_sample_value("fedrouter_feedback_total", counted) == before + 1
    assert [line.id for line in read_log(log, pytest.fail)] == [decided["id"]], "replay ignores feedback"


def test_a_response_counts_once_by_its_first_outcome(
    make_server: Callable[..., Server], adapter_of: Callable[[str], str], tmp_path: Path
) -> None:
    log = tmp_path / "decisions.jsonl"
    outcomes = ["good", "bad", "bad", "good", "bad"]

    def counts() -> list[float]:
        labels = [{"adapter": adapter_of("summary"), "outcome": outcome} for outcome in ("good", "bad")]
        return [REGISTRY.get_sample_value("fedrouter_feedback_total", one) or 0 for one in labels]

    async def scenario() -> tuple[list[Answer], Any]:
        async with make_server(log=LogOptions(log)) as server:
            key = (await server.ask(CHAT, chat(TASKS["summary"]))).routing["id"]
            answers = [await server.ask(FEEDBACK, {"id": key, "outcome": outcome}) for outcome in outcomes]
            return answers, (await server.ask(DECISIONS, method="GET")).json["decisions"][0]["feedback"]

    good, bad = counts()
    answers, shown = asyncio.run(scenario())
    assert [answer.json["counted"] for answer in answers] == [True, False, False, False, False]
    assert counts() == [good + 1, bad]
    assert shown == "bad"
    assert [line["outcome"] for line in lines(log)[1:]] == outcomes


def test_feedback_that_a_full_disk_loses_is_not_called_logged(
    make_server: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> Answer:
        async with make_server(log=LogOptions(Path("/dev/full"))) as server:
            key = (await server.ask(CHAT, chat(TASKS["summary"]))).routing["id"]
            return await server.ask(FEEDBACK, {"id": key, "outcome": "good"})

    answer = asyncio.run(scenario())
    assert (answer.status, answer.json["logged"]) == (200, False)
    [record] = [record for record in caplog.records if "are lost" in record.getMessage()]
    assert record.getMessage().endswith("/dev/full and are lost: No space left on device")
    assert record.exc_info is None


def test_a_failure_after_a_success_is_reported_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = DecisionLog(LogOptions(tmp_path / "log.jsonl"))
    stream = log._file.stream

    def written(number: int) -> bool:
        taken: Future[bool] = Future()
        log.write(lambda: {"n": number}, taken)
        return taken.result(10)

    def full() -> None:
        raise OSError(28, "No space left on device")

    for number in range(2):
        assert written(number)
        monkeypatch.setattr(stream, "flush", full)
        assert not written(number)
        assert not written(number)
        monkeypatch.undo()
    log.close()
    assert len(caplog.records) == 2


def test_a_tenant_sees_and_judges_its_own_requests_only(serve: Callable[..., Server]) -> None:
    async def scenario() -> tuple[Any, ...]:
        async with serve(access=Access(KEY, TENANTS)) as server:
            mine = (await server.ask(CHAT, chat(TASKS["headline"]), key="ann")).routing["id"]
            await server.ask(CHAT, chat(TASKS["summary"]), key="bob")
            as_ann = {"x-fedrouter-client": "ann"}
            await server.ask(CHAT, chat(TASKS["headline"]), key=KEY, headers=as_ann)
            seen = [
                [one["id"] for one in (await server.ask(DECISIONS, method="GET", key=key)).json["decisions"]]
                for key in ("ann", "bob", KEY)
            ]
            few = (await server.ask(DECISIONS, method="GET", query="limit=1")).json["decisions"]
            odd = (await server.ask(DECISIONS, method="GET", query="limit=-1")).status
            judged = {"id": mine, "outcome": "good"}
            statuses = [(await server.ask(FEEDBACK, judged, key=key)).status for key in ("bob", "ann", KEY)]
            return mine, seen, few, odd, statuses

    mine, (anns, bobs, all_of_them), few, odd, statuses = asyncio.run(scenario())
    assert anns == [mine], "a request that the operator sends as ann is not ann's"
    assert len(bobs) == 1
    assert len(all_of_them) == 3
    assert [one["id"] for one in few] == all_of_them[:1]
    assert odd == 400
    assert statuses == [404, 200, 200]
