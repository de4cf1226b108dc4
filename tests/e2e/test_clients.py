"""Clients that others wrote, against a real vLLM: openai, curl, LangChain, Anthropic's, vLLM's benchmark."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_openai import ChatOpenAI

from fedrouter.builtin import base_path
from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.types import Decision

PROMPTS = [record.turns[-1].content for task in TASKS for record in generate(task, "test", 2, seed=8)]
Offline = Callable[[str], Decision]


def user(prompt: str) -> list[Any]:
    return [{"role": "user", "content": prompt}]


def test_openai_many_at_once(server: Any, offline: Offline) -> None:
    async def ask(client: openai.AsyncOpenAI, prompt: str) -> list[str]:
        chat = client.chat.completions.create(model="fedrouter", messages=user(prompt), max_tokens=2)
        text = client.completions.create(model="fedrouter", prompt=prompt, max_tokens=2)
        response = client.responses.create(model="fedrouter", input=prompt, max_output_tokens=2)
        return [answer.model for answer in await asyncio.gather(chat, text, response)]

    async def all_of_them() -> list[list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.key, timeout=120) as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in PROMPTS))

    assert asyncio.run(all_of_them()) == [[offline(prompt).model] * 3 for prompt in PROMPTS]


def curl(server: Any, path: str, body: Any, *options: str) -> str:
    """Ask as a shell does; the key stays out of the command line."""
    given = [
        *("-sS", "-H", "Content-Type: application/json", "-d", json.dumps(body)),
        "-K",
        "-",
        *options,
    ]
    secret = f'header = "Authorization: Bearer {server.key}"'
    command = ["curl", *given, f"{server.url}{path}"]
    return subprocess.run(command, input=secret, capture_output=True, text=True, check=True).stdout


def test_curl_streams(server: Any, offline: Offline) -> None:
    body = {"model": "fedrouter", "messages": user(PROMPTS[0]), "max_tokens": 6, "stream": True}
    head, _, events = curl(server, "/v1/chat/completions", body, "-N", "-i").partition("\n\n")
    assert f"x-fedrouter-adapter: {offline(PROMPTS[0]).model}" in head.splitlines()
    data = [line.removeprefix("data: ") for line in events.splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    assert {json.loads(one)["model"] for one in data[:-1]} == {offline(PROMPTS[0]).model}


def test_langchain(server: Any, offline: Offline) -> None:
    model = ChatOpenAI(
        model="fedrouter",
        base_url=f"{server.url}/v1",
        api_key=server.key,
        temperature=0,
        max_tokens=8,
        include_response_headers=True,
    )
    answers = model.batch([*PROMPTS])
    assert [answer.response_metadata["model_name"] for answer in answers] == [
        offline(prompt).model for prompt in PROMPTS
    ]
    headers = answers[0].response_metadata["headers"]
    assert headers["x-fedrouter-cluster"] == offline(PROMPTS[0]).cluster
    pieces = list(model.stream(PROMPTS[0]))
    assert "".join(piece.text for piece in pieces) == answers[0].text
    assert asyncio.run(model.ainvoke(PROMPTS[1])).text == answers[1].text
    tools = model.bind_tools([{"name": "look", "description": "look", "parameters": {}}], tool_choice="none")
    assert tools.invoke(PROMPTS[0]).response_metadata["model_name"] == offline(PROMPTS[0]).model

    prompt = next(prompt for prompt in PROMPTS if not offline(prompt).fallback)
    conversation = [HumanMessage(prompt), AIMessage("Yes"), HumanMessage("shorter")]
    assert model.invoke(conversation).response_metadata["model_name"] == offline(prompt).model


def test_anthropics_client(server: Any, offline: Offline) -> None:
    asked: dict[str, Any] = {"model": "fedrouter", "max_tokens": 8, "extra_body": {"temperature": 0}}
    with anthropic.Anthropic(base_url=server.url, auth_token=server.key, max_retries=0) as client:
        for prompt in PROMPTS[::2]:
            answer = client.messages.create(messages=user(prompt), system=PROMPTS[1], **asked)
            assert answer.model == offline(prompt).model
            with client.messages.stream(messages=user(prompt), system=PROMPTS[1], **asked) as stream:
                text = "".join(stream.text_stream)
                assert stream.response.headers["x-fedrouter-adapter"] == answer.model
            assert text == answer.content[0].text
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(messages=user("hello"), **{**asked, "model": "no-such-model"})
        with pytest.raises(anthropic.AuthenticationError):
            client.with_options(auth_token="wrong").messages.create(messages=user("hello"), **asked)


# `vllm bench serve`, as docs/serving.md has it: the command does not start where vLLM is the build for CPUs.
BENCH = (
    "import vllm.benchmarks.serve as b, vllm.utils.argparse_utils as a; "
    "p = a.FlexibleArgumentParser(); b.add_cli_args(p); b.main(p.parse_args())"
)


def test_vllm_bench_serve(server: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS * 2))
    options = [
        "--base-url",
        server.url,
        "--model",
        "fedrouter",
        "--tokenizer",
        str(base_path("builtin:tiny")),
    ]
    options += ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]
    options += ["--dataset-name", "custom", "--dataset-path", str(file), "--custom-output-len", "8"]
    options += ["--skip-chat-template"]  # vLLM applies it
    options += ["--num-prompts", str(2 * len(PROMPTS)), "--max-concurrency", "8", "--disable-tqdm"]
    options += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    done = subprocess.run(
        [sys.executable, "-c", BENCH, *options],
        env={**os.environ, "OPENAI_API_KEY": server.key},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result.get("failed", 0)) == (2 * len(PROMPTS), 0)
    assert result["total_output_tokens"] >= result["completed"]
