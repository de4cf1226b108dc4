"""An embeddings endpoint that fails while the server runs, and recovers."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import write_word_bundle
from echo import TASKS, Answer, Server
from embeddings_server import DIM, MODEL, running

from fedrouter.bundle import Bundle
from fedrouter.embed import embedder_spec, load_embedder, probe
from fedrouter.serve.limits import Limits
from fedrouter.serve.routing import Routing
from fedrouter.types import RoutingSpace

NAMES = list(TASKS)


def write_endpoint_bundle(path: Path, url: str) -> Bundle:
    spec = embedder_spec("endpoint", MODEL, 64, "float32", url=url)
    embedder = load_embedder(spec, None, url=url)  # type: ignore[arg-type]
    eye, numbers = np.eye(DIM, dtype=np.float32), tuple(range(len(TASKS)))
    space = RoutingSpace(np.zeros(DIM, np.float32), eye, embedder.embed(list(TASKS.values())), numbers)
    return write_word_bundle(path, embedder=spec, space=space, probe_vectors=probe(embedder))


def serve(bundle: Bundle, url: str, hurry_s: float = 1.0, **limits: Any) -> Server:
    embedder = load_embedder(bundle.embedder, bundle.base, url=url)
    embedder.hurry(hurry_s)  # type: ignore[attr-defined]
    return Server(lambda: Routing(bundle, embedder, str, None, Limits(routing_timeout_s=60, **limits)))


async def ask(server: Server, task: str) -> Answer:
    return await server.ask("/v1/completions", {"model": "fedrouter", "prompt": TASKS[task]})


def test_the_base_answers_while_the_endpoint_is_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> tuple[list[Answer], Bundle]:
        with running() as there:
            bundle = write_endpoint_bundle(tmp_path / "bundle", there.url)
            async with serve(bundle, there.url) as server:
                answers = [await ask(server, "summary")]
                there.statuses = [500, 500]
                answers += [await ask(server, "summary"), await ask(server, "summary")]
                there.gate.clear()
                answers.append(await ask(server, "headline"))
                there.gate.set()
                answers.append(await ask(server, "headline"))
        return answers, bundle

    caplog.set_level(logging.WARNING, "vllm.fedrouter")
    answers, bundle = asyncio.run(scenario())
    adapters = {cluster.name: cluster.adapter for cluster in bundle.clusters}
    assert [answer.status for answer in answers] == [200] * 5
    wanted = [adapters["summary"], "base", "base", "base", adapters["headline"]]
    assert [answer.json["model"] for answer in answers] == wanted
    assert [answer.routing["fallback"] for answer in answers] == ["false", "true", "true", "true", "false"]
    logged = [
        record.getMessage() for record in caplog.records if "nothing can be routed" in record.getMessage()
    ]
    assert len(logged) == 2, "each problem is logged once"
    assert "500" in logged[0]
    assert "timed out" in logged[1]


def test_the_overload_policy_may_reject_instead(tmp_path: Path) -> None:
    async def scenario() -> Answer:
        with running() as there:
            bundle = write_endpoint_bundle(tmp_path / "bundle", there.url)
            async with serve(bundle, there.url, overload="reject") as server:
                there.statuses = [500]
                return await ask(server, "summary")

    answer = asyncio.run(scenario())
    assert answer.status == 503
    assert answer.headers["retry-after"] == "1"


def test_the_event_loop_goes_on_while_the_endpoint_is_slow(tmp_path: Path) -> None:
    async def scenario() -> tuple[Answer, Answer, int]:
        with running() as there:
            bundle = write_endpoint_bundle(tmp_path / "bundle", there.url)
            async with serve(bundle, there.url, hurry_s=30) as server:
                await ask(server, "summary")  # so that imports are not timed
                there.gate.clear()
                slow = asyncio.create_task(ask(server, "summary"))
                while not there.num_waiting:
                    await asyncio.sleep(0.01)
                waiting = [asyncio.create_task(ask(server, name)) for name in NAMES * 3]
                named = await server.ask("/v1/completions", {"model": "base", "prompt": "hello"})
                assert not slow.done()
                there.gate.set()
                num_requests = len(there.inputs)
                assert {(await one).status for one in waiting} == {200}
                return named, await slow, len(there.inputs) - num_requests

    named, slow, num_requests = asyncio.run(scenario())
    assert named.status == slow.status == 200
    assert num_requests == 2, "one for the slow prompt, one for all others together"
