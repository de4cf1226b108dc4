"""Several API-server processes before one engine: each routes, all count, none reloads."""

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.bundle import Bundle
from fedrouter.serve.launch import Options, free_port, running_server
from fedrouter.types import Decision

PROMPTS = [record.turns[-1].content for task in TASKS for record in generate(task, "test", 4, seed=7)]
NUM_PROCESSES = 2


@pytest.fixture(scope="module")
def several(small_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server's address, and its log."""
    log = tmp_path_factory.mktemp("several") / "log"
    options = Options(port=free_port(), vllm_args=["--api-server-count", str(NUM_PROCESSES)])
    with running_server(small_bundle.path, options, log=log) as url:
        yield url, log


def ask_all(url: str, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    """Ask at once, each over a connection of its own: the processes share them out."""

    async def one(body: dict[str, Any]) -> httpx.Response:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            return await client.post("/v1/completions", json={"max_tokens": 4, "temperature": 0, **body})

    async def every() -> list[httpx.Response]:
        return await asyncio.gather(*(one(body) for body in bodies))

    return asyncio.run(every())


def test_every_process_routes_and_all_are_counted(
    several: tuple[str, Path], offline: Callable[[str], Decision]
) -> None:
    url, log = several
    answers = ask_all(url, [{"model": "fedrouter", "prompt": prompt} for prompt in PROMPTS * 3])
    decided = [offline(prompt).model for prompt in PROMPTS * 3]
    assert [answer.json()["model"] for answer in answers] == decided
    assert [answer.headers["x-fedrouter-adapter"] for answer in answers] == decided
    lines = [line for line in log.read_text().splitlines() if "POST /v1/completions" in line]
    assert len({line.split("pid=")[1].split(")")[0] for line in lines}) == NUM_PROCESSES
    page = httpx.get(f"{url}/metrics").text
    counts = re.findall(r'^fedrouter_requests_total\{.*outcome="ok".*\} (\S+)$', page, re.MULTILINE)
    assert sum(map(float, counts)) == len(decided)


def test_an_adapters_name_means_the_same_in_every_process(
    several: tuple[str, Path], small_bundle: Bundle
) -> None:
    names = [*small_bundle.adapter_paths, "base"]
    bodies = [{"model": name, "prompt": PROMPTS[0], "logprobs": 1} for name in names for _ in range(8)]
    answers = ask_all(several[0], bodies)
    found = [answer.json()["choices"][0]["logprobs"]["token_logprobs"][0] for answer in answers]
    for i in range(len(names)):
        assert found[8 * i : 8 * i + 8] == pytest.approx([found[8 * i]] * 8, abs=1e-4), names[i]
    assert len({round(one, 4) for one in found[::8]}) == len(names)


def test_none_of_them_reloads(several: tuple[str, Path], small_bundle: Bundle) -> None:
    answer = httpx.post(
        f"{several[0]}/v1/fedrouter/reload", json={"bundle": small_bundle.path.name}, timeout=60
    )
    assert answer.status_code == 409
    assert "several API processes cannot reload" in answer.json()["error"]["message"]
