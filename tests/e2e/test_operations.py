"""Living with a real vLLM: metrics, readiness, a new bundle without a restart."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file

from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.bundle import Bundle, load_bundle, write_bundle
from fedrouter.serve.checks import free_port

ROOT = Path(__file__).parents[2]
PROMPT = "Blackford | population | 5683"
HTTP = httpx.Client(timeout=120)


def samples(url: str) -> dict[str, float]:
    """Every line of ``/metrics`` that is no comment: name with labels, value."""
    lines = [line for line in HTTP.get(f"{url}/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_the_dashboard_asks_for_numbers_that_vllm_shows(server: Any) -> None:
    page = HTTP.get(f"{server.url}/metrics").text
    there = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE):
        there |= (
            {name + ending for ending in ("_bucket", "_sum", "_count")} if kind == "histogram" else {name}
        )
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"\b(?:fedrouter_|vllm:)\w+", query)}
    assert len(asked) > 10
    assert asked <= there


def test_a_request_is_counted_where_it_went(server: Any) -> None:
    before = samples(server.url)
    answer = server.client.completions.create(model="fedrouter", prompt="population | 5683", max_tokens=1)
    name = f'fedrouter_requests_total{{adapter="{answer.model}",outcome="ok"}}'
    after = samples(server.url)
    assert after[name] == before.get(name, 0) + 1
    assert after["fedrouter_routing_seconds_count"] == before["fedrouter_routing_seconds_count"] + 1
    assert after["fedrouter_queue_depth"] == 0


@pytest.fixture
def second(server: Any, small_bundle: Bundle) -> Iterator[Bundle]:
    """Another bundle beside the served one, with one adapter of it; the first is served again afterwards."""
    states = [load_file(path / "adapter_model.safetensors") for path in small_bundle.adapter_paths.values()]
    *louder, generalist = [
        {name: np.float32(1.2) * tensor for name, tensor in state.items()} for state in states[1:]
    ]
    config = small_bundle.adapter_path(small_bundle.clusters[0]) / "adapter_config.json"
    template = small_bundle.chat_template
    path = small_bundle.path.parent / "second"
    if not path.exists():
        write_bundle(
            path,
            base=small_bundle.base,
            embedder=small_bundle.embedder,
            clusters=small_bundle.clusters,
            adapters=[states[0], *louder],
            adapter_config=json.loads(config.read_text()),
            space=small_bundle.space,
            probe_vectors=small_bundle.probe,
            fallback=small_bundle.fallback,
            versions=small_bundle.versions,
            chat_template=template.read_text() if template else None,
            generalist=generalist,
        )
    yield load_bundle(path)
    assert reload(server, small_bundle.path.name).returncode == 0


def reload(server: Any, bundle: str) -> subprocess.CompletedProcess[str]:
    """Reload as a user does it."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "fedrouter",
            "reload",
            server.url,
            bundle,
            "--api-key-env",
            "FEDROUTER_TEST_KEY",
        ],
        env={**os.environ, "FEDROUTER_TEST_KEY": server.key},
        capture_output=True,
        text=True,
        timeout=300,
    )


def post_reload(server: Any, bundle: str) -> httpx.Response:
    headers = {"authorization": f"Bearer {server.key}"}
    return HTTP.post(f"{server.url}/v1/fedrouter/reload", json={"bundle": bundle}, headers=headers)


def complete(server: Any, model: str = "fedrouter", prompt: str = PROMPT) -> Any:
    return server.client.completions.create(
        model=model, prompt=prompt, max_tokens=4, temperature=0, logprobs=1
    )


def test_is_ready_only_after_every_adapter_has_answered(server: Any) -> None:
    answer = HTTP.get(f"{server.url}/v1/fedrouter/ready")
    start = answer.json().get("start", "")
    assert (answer.status_code, answer.json()) == (200, {"state": "ready", "start": start})
    assert len(bytes.fromhex(start)) == 16


def test_another_bundle_is_served_without_a_restart(
    server: Any, small_bundle: Bundle, second: Bundle
) -> None:
    old, new = ([one.adapter for one in bundle.clusters] for bundle in (small_bundle, second))
    prompts = [record.turns[-1].content for task in TASKS for record in generate(task, "test", 3, seed=5)]
    before = [complete(server, prompt=prompt).model for prompt in prompts]
    done = reload(server, "second")
    assert done.returncode == 0, done.stderr
    assert "serves second" in done.stdout
    listed = {model.id for model in server.client.models.list()}
    assert listed == {"base", "fedrouter", "mine", *second.adapter_paths}
    after = [complete(server, prompt=prompt).model for prompt in prompts]
    assert after == [new[old.index(model)] if model in old else model for model in before]
    assert set(after) & set(new[1:])
    shown = HTTP.get(
        f"{server.url}/v1/fedrouter/clusters", headers={"authorization": f"Bearer {server.key}"}
    ).json()
    assert [cluster["adapter"] for cluster in shown["clusters"]] == new


def test_new_weights_answer_under_the_new_name(server: Any, second: Bundle) -> None:
    before = complete(server, "mine").choices[0].logprobs.token_logprobs
    assert post_reload(server, "second").status_code == 200
    found = {
        c.adapter: complete(server, c.adapter).choices[0].logprobs.token_logprobs for c in second.clusters
    }
    found["base"] = complete(server, "base").choices[0].logprobs.token_logprobs
    assert len({tuple(one) for one in found.values()}) == len(second.clusters) + 1
    assert (
        complete(server, "mine").choices[0].logprobs.token_logprobs
        == before
        == found[second.clusters[0].adapter]
    )


def test_no_request_fails_while_bundles_change(server: Any, small_bundle: Bundle, second: Bundle) -> None:
    async def scenario() -> tuple[list[int], list[str]]:
        headers = {"authorization": f"Bearer {server.key}"}
        statuses: list[int] = []
        stop = asyncio.Event()
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=120) as client:

            async def ask(number: int) -> None:
                body = {"model": "fedrouter", "prompt": f"{PROMPT} {number}", "max_tokens": 4}
                while not stop.is_set():
                    answer = await client.post("/v1/completions", json={**body, "stream": number % 2 == 0})
                    statuses.append(answer.status_code if "error" not in answer.text else -1)

            clients = [asyncio.create_task(ask(number)) for number in range(4)]
            reloads = []
            for name in ("second", small_bundle.path.name, "second"):
                answer = await client.post("/v1/fedrouter/reload", json={"bundle": name})
                reloads.append(answer.text if answer.status_code != 200 else "")
            stop.set()
            await asyncio.gather(*clients)
        return statuses, reloads

    statuses, reloads = asyncio.run(scenario())
    assert reloads == [""] * 3
    assert len(statuses) >= 4
    assert set(statuses) == {200}


def test_a_bad_bundle_is_refused_and_the_old_one_goes_on(server: Any, small_bundle: Bundle) -> None:
    bad = small_bundle.path.parent / "bad"
    shutil.copytree(small_bundle.path, bad)
    (bad / "router.safetensors").write_bytes(b"")
    done = reload(server, "bad")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "router.safetensors" in done.stderr
    assert complete(server).model in {"base", *(one.adapter for one in small_bundle.clusters)}
    for path in ("../run/bundle", "/etc", "no-such-bundle"):
        assert post_reload(server, path).status_code == 400


def test_a_watched_link_is_followed(server: Any, small_bundle: Bundle, second: Bundle) -> None:
    first, other = ({one.adapter for one in bundle.clusters} for bundle in (small_bundle, second))
    bad = small_bundle.path.with_name("damaged")
    shutil.copytree(small_bundle.path, bad)
    (bad / "manifest.json").write_text("{}")
    for name, outcome, wanted in (
        ("second", "loaded", other),
        (bad.name, "refused", other),
        (small_bundle.path.name, "loaded", first),
    ):
        count = f'fedrouter_reloads_total{{outcome="{outcome}"}}'
        before = samples(server.url).get(count, 0)
        point(small_bundle, name)
        deadline = time.monotonic() + 120
        while samples(server.url).get(count, 0) == before:
            assert time.monotonic() < deadline, f"{name} is not {outcome}"
            time.sleep(0.2)
        assert shown(server) == wanted
        assert complete(server).model in {"base", *wanted}


def point(small_bundle: Bundle, name: str) -> None:
    """Point the watched link to another bundle, as ``ln -sfn`` does."""
    new = small_bundle.path.with_name("new")
    new.symlink_to(name)
    new.replace(small_bundle.path.with_name("current"))


def shown(server: Any) -> set[str]:
    headers = {"authorization": f"Bearer {server.key}"}
    answer = HTTP.get(f"{server.url}/v1/fedrouter/clusters", headers=headers)
    return {cluster["adapter"] for cluster in answer.json()["clusters"]}


def test_vllms_own_way_to_load_adapters_is_closed(server: Any) -> None:
    body = {"lora_name": "evil", "lora_path": str(server.bundle.path), "name": "evil", "src": "/"}
    for key, status in ((None, 401), (server.key, 404)):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters"):
            assert HTTP.post(f"{server.url}{path}", json=body, headers=headers).status_code == status
    assert HTTP.delete(f"{server.url}/adapters/mine").status_code == 401
    assert "mine" in {model.id for model in server.client.models.list()}
    assert HTTP.post(f"{server.url}/v1/fedrouter/reload", json={"bundle": "second"}).status_code == 401


def test_a_proxy_routes_to_servers_elsewhere(server: Any, small_bundle: Bundle) -> None:
    port = free_port()
    arguments = ["serve", str(small_bundle.path), "--port", str(port), "--upstream", server.url]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedrouter", *arguments, "--api-key-env", "FEDROUTER_TEST_KEY"],
        env={**os.environ, "FEDROUTER_TEST_KEY": server.key},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert f"Ready: http://127.0.0.1:{port}/v1" in process.stdout.readline()
        headers = {"authorization": f"Bearer {server.key}"}
        body = {"model": "fedrouter", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
        address = f"http://127.0.0.1:{port}/v1/completions"
        there = HTTP.post(address, json=body, headers=headers)
        assert there.json()["model"] == there.headers["x-fedrouter-adapter"] == complete(server).model
        assert there.json()["choices"][0]["text"] == complete(server).choices[0].text
        with HTTP.stream("POST", address, json={**body, "stream": True}, headers=headers) as answer:
            lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
        assert len(lines) >= 4
        assert lines[-1] == "data: [DONE]"
        assert HTTP.post(address, json=body).status_code == 401
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
