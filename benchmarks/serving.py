"""What routing costs a real vLLM, and what it withstands: throughput, waits, start-up, search, reloading.

python benchmarks/serving.py                  trains a small bundle of the built-in tasks first
python benchmarks/serving.py --bundle DIR     an existing one
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from common import report
from rich.console import Console
from safetensors.numpy import load_file

from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.bundle import Bundle, load_bundle, write_bundle
from fedrouter.config import load_config
from fedrouter.embed import load_embedder
from fedrouter.models import resolve_base
from fedrouter.route import Router
from fedrouter.serve.launch import Options, free_port, prepare
from fedrouter.serve.process import running
from fedrouter.train.run import train
from fedrouter.types import RoutingSpace, TaskCluster

SMALL = ["data.num_clients=4", "data.num_per_task=60", "train.rounds=2", "train.steps=4", "cluster.global=4"]
PROMPTS = [record.turns[-1].content for task in TASKS for record in generate(task, "test", 16, seed=5)]
Ask = Callable[[str], Awaitable[httpx.Response]]


def start_seconds(bundle: Path, log: Path, bare: bool) -> float:
    """Return how long a server takes from its start to its first healthy (bare) or ready answer, seconds."""
    _, command = prepare(bundle, Options(port=free_port()))
    if bare:
        argv = list(command.argv)
        at = argv.index("--middleware")
        command = replace(command, argv=argv[:at] + argv[at + 2 :], ready_path="/health")
    began = time.perf_counter()
    with running(command, log, 900):
        return time.perf_counter() - began


async def load(ask: Ask, concurrency: int, number: int) -> tuple[float, list[float], list[httpx.Response]]:
    """Ask ``number`` prompts; return requests a second, latencies (ms) and answers."""
    queue = iter(range(number))
    latencies: list[float] = []
    answers: list[httpx.Response] = []

    async def worker() -> None:
        for i in queue:
            began = time.perf_counter()
            answers.append(await ask(PROMPTS[i % len(PROMPTS)]))
            latencies.append((time.perf_counter() - began) * 1000)

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return number / (time.perf_counter() - began), latencies, answers


def p95(values: list[float]) -> float:
    """Return the 95th percentile."""
    return float(np.percentile(values, 95))


def waits(answers: list[httpx.Response]) -> list[float]:
    """Return what routing took, ms, as the server says."""
    return [float(answer.headers["x-fedrouter-routing-ms"]) for answer in answers]


async def traffic(url: str) -> dict[str, Any]:
    """Compare routed requests with those that name the same adapters."""
    async with httpx.AsyncClient(
        base_url=url, timeout=300, limits=httpx.Limits(max_connections=64)
    ) as client:

        async def ask(model: str, prompt: str) -> httpx.Response:
            body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            answer = await client.post("/v1/completions", json=body)
            answer.raise_for_status()
            return answer

        named = {prompt: (await ask("fedrouter", prompt)).json()["model"] for prompt in PROMPTS}

        def routed(prompt: str) -> Awaitable[httpx.Response]:
            return ask("fedrouter", prompt)

        def direct(prompt: str) -> Awaitable[httpx.Response]:
            return ask(named[prompt], prompt)

        await load(direct, 64, 128)  # warm
        rates: dict[str, list[float]] = {"routed": [], "direct": []}
        for _ in range(4):  # taking turns, so that a busy moment hits both
            rates["direct"].append((await load(direct, 64, 256))[0])
            rates["routed"].append((await load(routed, 64, 256))[0])
        _, direct_ms, _ = await load(direct, 1, 128)
        _, routed_ms, alone = await load(routed, 1, 128)
        _, _, crowd = await load(routed, 32, 512)
    return {
        "rates": {kind: round(statistics.median(found), 2) for kind, found in rates.items()},
        "p95_wait_ms": {"1": p95(waits(alone)), "32": p95(waits(crowd))},
        "p50_ms": {"direct": statistics.median(direct_ms), "routed": statistics.median(routed_ms)},
    }


def embedding_ms(bundle: Bundle) -> float:
    """Return the median time of one embedding forward of one prompt, one thread, ms."""
    torch.set_num_threads(1)
    base = resolve_base(bundle.base.model, bundle.base.revision)
    embedder = load_embedder(bundle.embedder, bundle.base, base)
    embedder.embed(PROMPTS[:8])
    found = []
    for i in range(128):
        began = time.perf_counter()
        embedder.embed([PROMPTS[i % len(PROMPTS)]])
        found.append((time.perf_counter() - began) * 1000)
    return statistics.median(found)


async def reload_under_load(url: str, names: list[str], number: int, num_clients: int) -> dict[str, Any]:
    """Reload ``number`` times while clients ask without pause; return what became of all requests."""
    failed, answered, seconds = 0, 0, []
    stop = asyncio.Event()
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:

        async def ask(i: int) -> None:
            nonlocal failed, answered
            while not stop.is_set():
                body = {"model": "fedrouter", "prompt": PROMPTS[i], "max_tokens": 8, "stream": i % 2 == 0}
                answer = await client.post("/v1/completions", json=body)
                answered += 1
                failed += answer.status_code != 200 or '"error"' in answer.text
                i = (i + num_clients) % len(PROMPTS)

        clients = [asyncio.create_task(ask(i)) for i in range(num_clients)]
        for i in range(number):
            began = time.perf_counter()
            answer = await client.post("/v1/fedrouter/reload", json={"bundle": names[i % len(names)]})
            failed += answer.status_code != 200
            seconds.append(time.perf_counter() - began)
        stop.set()
        await asyncio.gather(*clients)
    return {"failed": failed, "answered": answered, "seconds_p50": round(statistics.median(seconds), 2)}


def search(bundle: Bundle) -> dict[str, Any]:
    """Compare the router with NumPy brute force over 10,000 centroids of 384 dimensions."""
    rng = np.random.default_rng(0)
    num, dim = 10_000, 384
    centroids = rng.normal(size=(num, dim)).astype(np.float32)
    clusters = tuple(TaskCluster(f"t{k}", f"a{k}", 1, (), {}, 1e9) for k in range(num))
    space = RoutingSpace(
        np.zeros(dim, np.float32), np.eye(dim, dtype=np.float32), centroids, tuple(range(num))
    )
    router = Router(replace(bundle, clusters=clusters, space=space))
    queries = rng.normal(size=(256, dim)).astype(np.float32)

    def brute(row: np.ndarray) -> int:
        return int(((centroids - row) ** 2).sum(axis=1).argmin())

    truth = [f"a{brute(row)}" for row in queries]
    alike = all(
        [d.model for i in range(0, 256, size) for d in router.route(queries[i : i + size])] == truth
        for size in (1, 7, 64, 256)
    )

    def median_ms(work: Callable[[int], Any]) -> float:
        found = []
        for i in range(100):
            began = time.perf_counter()
            work(i)
            found.append((time.perf_counter() - began) * 1000)
        return statistics.median(found)

    return {
        "faiss_ms": median_ms(lambda i: router.route(queries[i : i + 1])),
        "numpy_ms": median_ms(lambda i: brute(queries[i])),
        "alike": alike,
    }


def second_bundle(first: Bundle, path: Path) -> None:
    """Write the same bundle with other weights."""
    states = [load_file(first.adapter_path(one) / "adapter_model.safetensors") for one in first.clusters]
    config = first.adapter_path(first.clusters[0]) / "adapter_config.json"
    write_bundle(
        path,
        base=first.base,
        embedder=first.embedder,
        clusters=first.clusters,
        adapters=[{name: np.float32(1.1) * tensor for name, tensor in state.items()} for state in states],
        adapter_config=json.loads(config.read_text()),
        space=first.space,
        probe_vectors=first.probe,
        fallback=first.fallback,
        versions=first.versions,
        chat_template=first.chat_template.read_text() if first.chat_template else None,
    )


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--reloads", type=int, default=20)
    parser.add_argument("--name", default="serving")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        path = options.bundle or train(load_config(None, SMALL), out / "run", Console(quiet=True)).path
        shutil.copytree(path, out / "bundles" / "one")
        first = load_bundle(out / "bundles" / "one")
        second_bundle(first, out / "bundles" / "two")
        found = search(first)
        alone = embedding_ms(first)
        ready = {
            kind: round(start_seconds(first.path, out / f"{kind}.log", kind == "bare"), 1)
            for kind in ("bare", "routed", "bare")
        }
        _, command = prepare(first.path, Options(port=free_port()))
        with running(command, out / "server.log", 900):
            measured = asyncio.run(traffic(command.url))
            reloads = asyncio.run(reload_under_load(command.url, ["two", "one"], options.reloads, 16))
    share = measured["rates"]["routed"] / measured["rates"]["direct"]
    crowd = measured["p95_wait_ms"]["32"] / measured["p95_wait_ms"]["1"]
    added = measured["p50_ms"]["routed"] - measured["p50_ms"]["direct"]
    slower, faster = ready["routed"] / ready["bare"], found["numpy_ms"] / found["faiss_ms"]
    rows = [
        ("routed ÷ direct throughput, 64 at once", f"{share:.3f}", "≥ 0.95", share >= 0.95),
        ("p95 routing wait, 32 at once ÷ alone", f"{crowd:.2f}", "≤ 3", crowd <= 3),
        ("added p50 alone ÷ one embedding", f"{added / alone:.2f}", "≤ 1.15", added <= 1.15 * alone),
        ("ready time ÷ bare vLLM", f"{slower:.2f}", "≤ 1.1", slower <= 1.1),
        ("routing over 10,000 centroids, ms", f"{found['faiss_ms']:.2f}", "≤ 1", found["faiss_ms"] <= 1),
        ("NumPy ÷ FAISS", f"{faster:.1f}", "≥ 3", faster >= 3),
        ("same decisions in any batch", str(found["alike"]), "True", found["alike"]),
        (
            f"failed requests, {options.reloads} reloads, 16 clients",
            f"{reloads['failed']} of {reloads['answered']}",
            "0",
            reloads["failed"] == 0,
        ),
    ]
    results = {
        **measured,
        "embedding_ms": round(alone, 3),
        "ready_s": ready,
        "search": {name: round(value, 3) for name, value in found.items()},
        "reloads": reloads,
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
    }
    report(options.name, results, rows)


if __name__ == "__main__":
    main()
