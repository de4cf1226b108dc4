"""A bundle served by a real vLLM, asked through the ``openai`` package and by hand."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from safetensors.torch import load_file, save_file

from fedrouter.builtin import base_path
from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.errors import ServingError
from fedrouter.serve.checks import free_port
from fedrouter.serve.launch import Options, running_server
from fedrouter.types import Decision

PROMPTS = [record.turns[-1].content for task in TASKS for record in generate(task, "test", 3, seed=5)]
HTTP = httpx.Client(timeout=120)
Offline = Callable[[str], Decision]


def chat(prompt: str, model: str = "fedrouter", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0, **more}


def complete(prompt: Any, model: str = "fedrouter", **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, **more}


def assert_decided(headers: Any, model: str, decision: Decision) -> None:
    assert headers["x-fedrouter-adapter"] == model == decision.model
    assert headers["x-fedrouter-cluster"] == decision.cluster
    assert float(headers["x-fedrouter-distance"]) == pytest.approx(decision.distance, rel=1e-3, abs=1e-3)
    assert float(headers["x-fedrouter-margin"]) == pytest.approx(decision.margin, rel=1e-2, abs=1e-2)
    assert headers["x-fedrouter-fallback"] == str(decision.fallback).lower()
    assert float(headers["x-fedrouter-routing-ms"]) > 0


def test_says_when_it_is_ready_and_how_to_try_it(server: Any) -> None:
    ready, example = server.ready
    assert server.url in ready
    assert example.startswith("Try: curl ")
    assert server.key not in example
    command = example.removeprefix("Try: ").strip()
    answer = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "FEDROUTER_TEST_KEY": server.key},
        capture_output=True,
        text=True,
    )
    assert "200 OK" in answer.stdout
    assert "x-fedrouter-adapter: " in answer.stdout


def test_lists_every_model(server: Any) -> None:
    listed = {model.id for model in server.client.models.list()}
    assert listed == {"base", "fedrouter", "mine", *server.bundle.adapter_paths}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_chat_goes_where_the_router_says(server: Any, offline: Offline, prompt: str) -> None:
    answer = server.client.chat.completions.with_raw_response.create(**chat(prompt))
    assert_decided(answer.headers, answer.parse().model, offline(prompt))


def test_the_prompts_use_several_adapters(server: Any, offline: Offline) -> None:
    models = {offline(prompt).model for prompt in PROMPTS}
    assert len(models - {"base"}) >= 2, (
        "the other tests would not notice a router that never changes its mind"
    )


def test_completions_go_where_the_router_says(server: Any, offline: Offline) -> None:
    for prompt in PROMPTS[::3]:
        answer = server.client.completions.with_raw_response.create(**complete(prompt))
        assert_decided(answer.headers, answer.parse().model, offline(prompt))


def test_streams_as_it_answers(server: Any, offline: Offline) -> None:
    for prompt in PROMPTS[::3]:
        whole = server.client.chat.completions.create(**chat(prompt)).choices[0].message.content
        with server.client.chat.completions.with_streaming_response.create(
            **chat(prompt, stream=True)
        ) as answer:
            chunks = list(answer.parse())
            assert_decided(answer.headers, chunks[0].model, offline(prompt))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
        assert len(chunks) > 2
        pieces = list(server.client.completions.create(**complete(prompt, stream=True)))
        assert {piece.model for piece in pieces} == {offline(prompt).model}


def test_routing_changes_the_name_and_nothing_else(server: Any, offline: Offline) -> None:
    prompt = PROMPTS[0]
    options: dict[str, Any] = {
        "n": 2,
        "temperature": 0.7,
        "logprobs": True,
        "top_logprobs": 2,
        "stop": ["zzz"],
        "seed": 3,
    }
    routed = server.client.chat.completions.create(**chat(prompt, **options))
    named = server.client.chat.completions.with_raw_response.create(
        **chat(prompt, offline(prompt).model, **options)
    )
    assert routed.choices == named.parse().choices
    assert len(routed.choices) == 2
    assert not [name for name in named.headers if name.startswith("x-fedrouter")]


def test_adapters_and_base_answer_as_named(server: Any) -> None:
    names = ["base", "mine", *(cluster.adapter for cluster in server.bundle.clusters)]
    options = {"max_tokens": 4, "logprobs": 1, "extra_body": {"ignore_eos": True}}
    first = {}  # by name: how likely the first token was
    for name in names:
        answer = server.client.completions.create(**complete(PROMPTS[0], name, **options))
        assert answer.model == name
        first[name] = round(answer.choices[0].logprobs.token_logprobs[0], 3)
    assert first["mine"] == first[server.bundle.clusters[0].adapter]
    assert len(set(first.values())) == len(names) - 1, (
        "an adapter loads and yet another, or the base, answers"
    )


def test_many_at_once_each_get_their_own_decision(server: Any, offline: Offline) -> None:
    async def burst() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.key, timeout=120) as client:
            return await asyncio.gather(
                *(client.chat.completions.create(**chat(prompt)) for prompt in PROMPTS * 4)
            )

    answers = asyncio.run(burst())
    assert [answer.model for answer in answers] == [offline(prompt).model for prompt in PROMPTS * 4]


def test_text_parts_count_and_the_last_user_turn_decides(server: Any, offline: Offline) -> None:
    first, *_, last = (prompt for prompt in PROMPTS if not offline(prompt).fallback)
    messages = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": [{"type": "text", "text": last}]},
    ]
    answer = server.client.chat.completions.with_raw_response.create(**chat("", messages=messages))
    assert_decided(answer.headers, answer.parse().model, offline(last))


def test_tokens_are_routed_as_their_text(server: Any, offline: Offline) -> None:
    headers = {"authorization": f"Bearer {server.key}"}
    body = {"model": "base", "prompt": PROMPTS[4], "add_special_tokens": False}
    ids = HTTP.post(f"{server.url}/tokenize", json=body, headers=headers).json()["tokens"]
    assert server.client.completions.create(**complete([ids])).model == offline(PROMPTS[4]).model


def test_without_text_the_base_answers(server: Any) -> None:
    answer = server.client.chat.completions.with_raw_response.create(**chat(" "))
    assert answer.parse().model == answer.headers["x-fedrouter-adapter"] == "base"
    assert answer.headers["x-fedrouter-fallback"] == "true"


@pytest.mark.parametrize("body", [b'{"model": "fedrouter", "messages": 3}', b'{"model": "fedrouter"}'])
def test_what_cannot_be_routed_is_refused_in_vllms_shape(server: Any, body: bytes) -> None:
    headers = {"authorization": f"Bearer {server.key}", "content-type": "application/json"}
    routed, direct = (
        HTTP.post(f"{server.url}/v1/chat/completions", content=content, headers=headers)
        for content in (body, body.replace(b"fedrouter", b"base"))
    )
    assert routed.status_code == direct.status_code == 400
    assert routed.json()["error"].keys() == direct.json()["error"].keys()
    assert "messages" in routed.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"{", b""])
def test_garbage_is_vllms_to_refuse(server: Any, body: bytes) -> None:
    headers = {"authorization": f"Bearer {server.key}", "content-type": "application/json"}
    routed = HTTP.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)
    direct = HTTP.post(
        f"{server.url}/v1/chat/completions", content=body.replace(b"fedrouter", b"base"), headers=headers
    )
    assert routed.status_code == direct.status_code == 400
    assert routed.text.replace("fedrouter", "base") == direct.text


@pytest.mark.parametrize("model", ["fedrouter", "base"])
def test_no_request_for_a_prompts_log_likelihoods_reaches_the_engine(server: Any, model: str) -> None:
    headers = {"authorization": f"Bearer {server.key}"}
    chat_body = {"model": model, "messages": [{"role": "user", "content": PROMPTS[0]}], "max_tokens": 1}
    text = {"model": model, "prompt": PROMPTS[0], "max_tokens": 1}
    for path, body in (
        ("chat/completions", chat_body | {"prompt_logprobs": 0}),
        ("chat/completions", chat_body | {"echo": True}),
        ("completions", text | {"echo": True, "logprobs": 0}),
    ):
        assert HTTP.post(f"{server.url}/v1/{path}", json=body, headers=headers).status_code == 400
    for path, body in (
        ("chat/completions", chat_body | {"logprobs": True}),
        ("completions", text | {"echo": True}),
    ):
        assert HTTP.post(f"{server.url}/v1/{path}", json=body, headers=headers).status_code == 200


def test_an_unknown_model_is_a_404(server: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        server.client.chat.completions.create(**chat("hello", "no-such-model"))


def test_a_wrong_key_is_a_401_everywhere(server: Any) -> None:
    with pytest.raises(openai.AuthenticationError):
        server.client.with_options(api_key="wrong").chat.completions.create(**chat("hello"))
    assert HTTP.get(f"{server.url}/v1/fedrouter/clusters").status_code == 401
    assert HTTP.post(f"{server.url}/v1/fedrouter/route", json={"prompt": "hello"}).status_code == 401


def test_lists_its_clusters(server: Any) -> None:
    answer = HTTP.get(
        f"{server.url}/v1/fedrouter/clusters", headers={"authorization": f"Bearer {server.key}"}
    )
    assert answer.json()["base"]["fingerprint"] == server.bundle.base.fingerprint
    for shown, cluster in zip(answer.json()["clusters"], server.bundle.clusters, strict=True):
        assert (shown["name"], shown["adapter"]) == (cluster.name, cluster.adapter)
        assert shown["radius"] == pytest.approx(cluster.radius)


def test_a_dry_run_decides_as_offline(server: Any, offline: Offline) -> None:
    headers = {"authorization": f"Bearer {server.key}"}
    answer = HTTP.post(
        f"{server.url}/v1/fedrouter/route", json={"prompt": PROMPTS[2]}, headers=headers
    ).json()
    decision = offline(PROMPTS[2])
    assert answer["model"] == decision.model
    assert answer["distances"] == pytest.approx(dict(decision.distances), rel=1e-3, abs=1e-3)


def test_the_server_survives_a_client_that_leaves(server: Any) -> None:
    body = chat(PROMPTS[0], stream=True, max_tokens=200, ignore_eos=True)
    headers = {"authorization": f"Bearer {server.key}"}
    with HTTP.stream("POST", f"{server.url}/v1/chat/completions", json=body, headers=headers) as answer:
        assert "x-fedrouter-adapter" in answer.headers
        next(answer.iter_lines())
    assert server.client.chat.completions.create(**chat(PROMPTS[0])).choices


def test_a_flag_that_vllm_does_not_know_is_one_clear_line(server: Any) -> None:
    answer = subprocess.run(
        [
            sys.executable,
            "-m",
            "fedrouter",
            "serve",
            str(server.bundle.path),
            "--port",
            str(free_port()),
            "--",
            "--no-such-flag",
        ],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert answer.returncode == 1
    assert "unrecognized arguments: --no-such-flag" in answer.stderr.splitlines()[-1]


def test_weights_that_are_not_those_of_training_are_one_clear_line(server: Any, tmp_path: Path) -> None:
    base = Path(shutil.copytree(base_path("builtin:tiny"), tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    louder = {name: tensor * 1.1 for name, tensor in weights.items()}
    save_file(louder, base / "model.safetensors", metadata={"format": "pt"})
    options = Options(base=str(base), port=free_port())
    with (
        pytest.raises(ServingError, match="not the one used in training"),
        running_server(server.bundle.path, options, log=tmp_path / "log"),
    ):
        pass
