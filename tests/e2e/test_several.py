"""Several API-server processes before one engine: each routes, all count, none reloads."""

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import psutil
import pytest

from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.bundle import Bundle
from fedrouter.serve.checks import free_port
from fedrouter.serve.launch import Options, running_server
from fedrouter.types import Decision

PROMPTS = [record.turns[-1].content for task in TASKS for record in generate(task, "test", 4, seed=7)]
NUM_PROCESSES = 2


@pytest.fixture(scope="module")
def several(small_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server's address."""
    log = tmp_path_factory.mktemp("several") / "log"
    options = Options(port=free_port(), vllm_args=["--api-server-count", str(NUM_PROCESSES)])
    with running_server(small_bundle.path, options, log=log) as url:
        yield url


def ask_all(url: str, bodies: list[dict[str, Any]]) -> tuple[list[httpx.Response], set[int | None]]:
    """Ask at once, each over a connection of its own; return answers, and the processes that gave them."""

    async def every() -> tuple[list[httpx.Response], set[int | None]]:
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=120)) for _ in bodies
            ]
            asked = [
                client.post("/v1/completions", json={"max_tokens": 4, "temperature": 0, **body})
                for client, body in zip(clients, bodies, strict=True)
            ]
            answers = await asyncio.gather(*asked)
            port = int(url.rsplit(":", 1)[1])
            kept = [one for one in psutil.net_connections("tcp") if one.laddr and one.laddr.port == port]
            return answers, {one.pid for one in kept if one.status == psutil.CONN_ESTABLISHED}

    return asyncio.run(every())


def test_every_process_routes_and_all_are_counted(several: str, offline: Callable[[str], Decision]) -> None:
    bodies = [{"model": "fedrouter", "prompt": prompt} for prompt in PROMPTS * 3]
    answers, processes = ask_all(several, bodies)
    decided = [offline(prompt).model for prompt in PROMPTS * 3]
    assert [answer.json()["model"] for answer in answers] == decided
    assert [answer.headers["x-fedrouter-adapter"] for answer in answers] == decided
    assert len(processes) == NUM_PROCESSES
    page = httpx.get(f"{several}/metrics").text
    counts = re.findall(r'^fedrouter_requests_total\{.*outcome="ok".*\} (\S+)$', page, re.MULTILINE)
    assert sum(map(float, counts)) == len(decided)


def test_an_adapters_name_means_the_same_in_every_process(several: str, small_bundle: Bundle) -> None:
    names = [*small_bundle.adapter_paths, "base"]
    bodies = [{"model": name, "prompt": PROMPTS[0], "logprobs": 1} for name in names for _ in range(8)]
    answers, _ = ask_all(several, bodies)
    found = [answer.json()["choices"][0]["logprobs"]["token_logprobs"][0] for answer in answers]
    for i in range(len(names)):
        assert found[8 * i : 8 * i + 8] == pytest.approx([found[8 * i]] * 8, abs=1e-4), names[i]
    assert len({round(one, 4) for one in found[::8]}) == len(names)


def test_none_of_them_reloads(several: str, small_bundle: Bundle) -> None:
    answer = httpx.post(f"{several}/v1/fedrouter/reload", json={"bundle": small_bundle.path.name}, timeout=60)
    assert answer.status_code == 409
    assert "several API processes cannot reload" in answer.json()["error"]["message"]
