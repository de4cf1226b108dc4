"""Cost of routing with a real vLLM, and its robustness: throughput, waits, start-up, search, reloads.

python benchmarks/serving.py                  first trains a small bundle of the built-in tasks; 15 minutes
python benchmarks/serving.py --bundle DIR     uses an existing bundle
python benchmarks/serving.py --starts 0 --reloads 0 --minutes 0 --name traffic      only a part
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
import torch
from common import report
from mix import mix, resident_mib
from rich.console import Console
from safetensors.numpy import load_file
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.bundle import Bundle, load_bundle, write_bundle
from fedrouter.config_file import load_config
from fedrouter.embed import load_embedder
from fedrouter.models import resolve_base
from fedrouter.route import Router
from fedrouter.serve.checks import free_port
from fedrouter.serve.launch import Options, prepare
from fedrouter.serve.process import running
from fedrouter.train.run import train
from fedrouter.types import RoutingSpace, TaskCluster

SMALL = ["data.num_clients=4", "data.num_per_task=60", "train.rounds=2", "train.steps=4", "cluster.global=4"]
PROMPTS = [record.turns[-1].content for task in TASKS for record in generate(task, "test", 64, seed=5)]
WARM_RELOADS = 4  # before memory is measured
Reply = Mapping[str, str]  # the headers of a response
Ask = Callable[[int], Awaitable[Reply]]


def bare_seconds(bundle: Path, log: Path) -> float:
    """Return the seconds until /health is good of vLLM alone, with the flags of ``fedrouter serve``."""
    _, command = prepare(bundle, Options(port=free_port()))
    argv = list(command.argv)
    at = argv.index("--middleware")
    command = replace(command, argv=argv[:at] + argv[at + 2 :], ready_path="/health")
    began = time.perf_counter()
    with running(command, log, 900):
        return time.perf_counter() - began


def serve_seconds(bundle: Path, log: Path) -> float:
    """Return the seconds from the command ``fedrouter serve`` to its line Ready."""
    command = [sys.executable, "-m", "fedrouter", "serve", str(bundle), "--port", str(free_port())]
    with log.open("w") as errors:
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            seconds = time.perf_counter() - began
            process.terminate()
    assert line.startswith("Ready"), log.read_text()[-2000:]
    return seconds


async def load(ask: Ask, concurrency: int, number: int) -> tuple[float, list[Reply]]:
    """Send ``number`` prompts; return requests per second, and the replies.

    The first 2 × ``concurrency`` replies are left out, because all clients start at the same time.
    """
    queue = iter(range(number))
    answers: list[Reply] = []

    async def worker() -> None:
        for i in queue:
            answer = await ask(i % len(PROMPTS))
            answers.append(answer)

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return number / (time.perf_counter() - began), answers[2 * concurrency :]


def p95(values: list[float]) -> float:
    """Return the 95th percentile."""
    return float(np.percentile(values, 95))


def waits(answers: list[Reply]) -> list[float]:
    """Return the routing times in the headers, ms."""
    return [float(headers["x-fedrouter-routing-ms"]) for headers in answers]


async def traffic(url: str) -> dict[str, Any]:
    """Compare routed requests with requests that name the same adapters.

    Answers have 4 to 12 tokens, like real answers of different lengths; the wait at 32 is also measured with
    answers of equal length, which bring all clients back in the same step of the engine. The clients share
    the server's two cores and therefore use aiohttp, which costs a seventh of httpx (docs/internals/log.md).
    """
    timeout, connector = aiohttp.ClientTimeout(300), aiohttp.TCPConnector(limit=64, keepalive_timeout=2)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as client:

        async def ask(model: str, i: int, tokens: int | None = None) -> Reply:
            size = tokens or 4 + 7 * i % 9
            body = {"model": model, "prompt": PROMPTS[i], "max_tokens": size, "temperature": 0}
            async with client.post("/v1/completions", json=body | {"ignore_eos": True}) as answer:
                answer.raise_for_status()
                await answer.read()
                return answer.headers

        def routed(i: int) -> Awaitable[Reply]:
            return ask("fedrouter", i)

        named = [
            headers["x-fedrouter-adapter"]
            for headers in await asyncio.gather(*(routed(i) for i in range(len(PROMPTS))))
        ]

        def direct(i: int) -> Awaitable[Reply]:
            return ask(named[i], i)

        for way in (direct, routed):  # warm-up
            await load(way, 64, 128)
        rates: dict[str, list[float]] = {"routed": [], "direct": []}
        for turn in range(8):  # alternately, so that other load affects both
            for kind, way in (("routed", routed), ("direct", direct))[:: 1 if turn % 2 else -1]:
                rates[kind].append((await load(way, 64, 256))[0])
        ms: dict[str, list[float]] = {"direct": [], "routed": []}
        alone: list[Reply] = []
        for i in range(128):  # alternately, also in their order
            for kind in ("direct", "routed")[:: 1 if i % 2 else -1]:
                model = named[i] if kind == "direct" else "fedrouter"
                began = time.perf_counter()
                answer = await ask(model, i, 8)
                ms[kind].append((time.perf_counter() - began) * 1000)
                alone += [answer] if kind == "routed" else []
        _, crowd = await load(routed, 32, 1024)
        _, in_step = await load(lambda i: ask("fedrouter", i, 8), 32, 512)
    p95_ms = {"1": p95(waits(alone)), "32": p95(waits(crowd)), "32_in_step": p95(waits(in_step))}
    return {
        "rates": {kind: [round(rate, 2) for rate in found] for kind, found in rates.items()},
        "p95_wait_ms": {name: round(value, 2) for name, value in p95_ms.items()},
        "p50_wait_ms": {"1": statistics.median(waits(alone)), "32": statistics.median(waits(crowd))},
        "p50_ms": {kind: statistics.median(took) for kind, took in ms.items()},
        "added_p50_ms": statistics.median(r - d for r, d in zip(ms["routed"], ms["direct"], strict=True)),
    }


def embedding_ms(bundle: Bundle) -> dict[str, float]:
    """Return the median time of embedding one prompt with one thread, ms.

    "paced" embeds one prompt every 0.1 s, like requests that wait for their answers; caches are then cold.
    """
    torch.set_num_threads(1)
    base = resolve_base(bundle.base.model, bundle.base.revision)
    embedder = load_embedder(bundle.embedder, bundle.base, base)
    embedder.embed(PROMPTS[:8])
    found: dict[str, list[float]] = {"in a row": [], "paced": []}
    for kind, pause in (("in a row", 0.0), ("paced", 0.1)):
        for i in range(128):
            time.sleep(pause)
            began = time.perf_counter()
            embedder.embed([PROMPTS[i]])
            found[kind].append((time.perf_counter() - began) * 1000)
    return {kind: round(statistics.median(times), 3) for kind, times in found.items()}


async def reload_under_load(
    url: str, pid: int, names: list[str], number: int, num_clients: int
) -> dict[str, Any]:
    """Reload ``number`` times while clients send requests; return counts, seconds and memory."""
    failed, answered, seconds, memory = 0, 0, list[float](), list[float]()
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
            memory.append(resident_mib(pid))
        stop.set()
        await asyncio.gather(*clients)
    took = round(statistics.median(seconds), 2)
    return {"failed": failed, "answered": answered, "seconds_p50": took, "memory_mib": memory}


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
    states = [load_file(first.adapter_path(c) / "adapter_model.safetensors") for c in first.clusters]
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


def growth(memory: list[float], skip: int) -> float:
    """Return the relative growth of memory from sample ``skip`` to the end; each is the maximum of three."""
    return max(memory[-3:]) / max(memory[skip : skip + 3]) - 1


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--starts", type=int, default=3, help="starts with and without fedrouter")
    parser.add_argument("--reloads", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=5, help="minutes of mixed traffic")
    parser.add_argument("--name", default="serving")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    rows: list[tuple[str, str, str, bool | None]] = []
    results: dict[str, Any] = {}

    def figure(label: str, value: float, wanted: float, at_least: bool = False, digits: int = 2) -> None:
        reached = value >= wanted if at_least else value <= wanted
        rows.append((label, f"{value:.{digits}f}", f"{'≥' if at_least else '≤'} {wanted:g}", reached))

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        path = options.bundle or train(load_config(None, SMALL), out / "run", Console(quiet=True)).path
        shutil.copytree(path, out / "bundles" / "one")
        first = load_bundle(out / "bundles" / "one")
        second_bundle(first, out / "bundles" / "two")
        with threadpool_limits(1):  # as in the server
            found = search(first)
        alone = embedding_ms(first)
        ready: dict[str, list[float]] = {"bare": [], "served": []}
        for i in range(options.starts):
            ready["bare"].append(round(bare_seconds(first.path, out / f"bare-{i}.log"), 2))
            ready["served"].append(round(serve_seconds(first.path, out / f"served-{i}.log"), 2))
        _, command = prepare(first.path, Options(port=free_port()))
        with running(command, out / "server.log", 900) as process:
            measured = asyncio.run(traffic(command.url))
            if options.reloads:
                number = options.reloads + WARM_RELOADS
                reloads = asyncio.run(reload_under_load(command.url, process.pid, ["two", "one"], number, 16))
            if options.minutes:
                names = [cluster.adapter for cluster in first.clusters]
                mixed = asyncio.run(mix(command.url, process.pid, options.minutes, PROMPTS, names))
    rates = {kind: statistics.median(found_) for kind, found_ in measured["rates"].items()}
    wait, added = measured["p95_wait_ms"], measured["added_p50_ms"]
    figure("routed ÷ direct throughput, 64 clients", rates["routed"] / rates["direct"], 0.95, True, 3)
    figure("p95 routing wait, 32 clients ÷ one client", wait["32"] / wait["1"], 3)
    rows.append(("the same, answers of equal length", f"{wait['32_in_step'] / wait['1']:.2f}", "", None))
    figure("latency added for one client (p50) ÷ one embedding at that pace", added / alone["paced"], 1.15)
    rows.append(("the same ÷ one of many embeddings in a row", f"{added / alone['in a row']:.2f}", "", None))
    if options.starts:
        bare, served = (statistics.median(ready[kind]) for kind in ("bare", "served"))
        figure("fedrouter serve ready ÷ bare vLLM", served / bare, 1.1, digits=3)
    figure("routing over 10,000 centroids, ms", found["faiss_ms"], 1)
    figure("NumPy ÷ FAISS", found["numpy_ms"] / found["faiss_ms"], 3, True, 1)
    rows.append(("same decisions in any batch", str(found["alike"]), "True", found["alike"]))
    if options.reloads:
        asked = f"{reloads['failed']} of {reloads['answered']}"
        label = f"failed requests, {options.reloads} reloads, 16 clients"
        rows.append((label, asked, "0", reloads["failed"] == 0))
        figure("growth of memory over reloads", growth(reloads["memory_mib"], WARM_RELOADS), 0.05, digits=3)
        results["reloads"] = reloads
    if options.minutes:
        number = sum(sum(counts.values()) for counts in mixed["statuses"].values())
        label = f"{options.minutes:g} minutes of mixed traffic, 5 % garbage: unexpected statuses"
        rows.append((label, f"{len(mixed['failures'])} of {number}", "0", not mixed["failures"]))
        rows.append(("ready afterwards", str(mixed["healthy"]), "True", mixed["healthy"]))
        minute = min(12, len(mixed["memory_mib"]) // 2)
        for processes, kind in (("all processes", "memory_mib"), ("the middleware's process", "hook_mib")):
            label = f"growth of memory after the first minute, {processes}"
            figure(label, growth(mixed[kind], minute), 0.05, digits=3)
        results["mix"] = mixed
    results |= {
        **measured,
        "embedding_ms": alone,
        "ready_s": ready,
        "search": {name: round(value, 3) for name, value in found.items()},
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
    }
    report(options.name, results, rows)


if __name__ == "__main__":
    main()
