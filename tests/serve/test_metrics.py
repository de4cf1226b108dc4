"""Metrics, of one process and summed over several."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from echo import TASKS, Server, WordEmbedder
from holder import HolderApp
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from fedrouter.bundle import Bundle
from fedrouter.serve.paths import ROUTED

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"
COMPLETIONS = "/v1/completions"


class Since:
    """How much a metric has grown since the test began; the registry belongs to the whole process."""

    def __init__(self) -> None:
        self._before = self._now()

    def __call__(self, name: str, **labels: str) -> float:
        key = name, tuple(sorted(labels.items()))
        return self._now().get(key, 0.0) - self._before.get(key, 0.0)

    def _now(self) -> dict[Any, float]:
        samples = (sample for metric in REGISTRY.collect() for sample in metric.samples)
        return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}


@pytest.fixture
def since() -> Since:
    return Since()


def ask(server: Server, *prompts: Any) -> list[Any]:
    async def all_of_them() -> list[Any]:
        async with server:
            bodies = [{"model": "fedrouter", "prompt": prompt} for prompt in prompts]
            return await asyncio.gather(*(server.ask(COMPLETIONS, body) for body in bodies))

    return asyncio.run(all_of_them())


def test_counts_requests_by_adapter(server: Server, adapter_of: Callable[[str], str], since: Since) -> None:
    ask(server, TASKS["headline"], TASKS["headline"], TASKS["summary"], "zebra " * 50, " ")
    assert since("fedrouter_requests_total", adapter=adapter_of("headline"), outcome="ok") == 2
    assert since("fedrouter_requests_total", adapter=adapter_of("summary"), outcome="ok") == 1
    assert since("fedrouter_requests_total", adapter="base", outcome="ok") == 2
    assert since("fedrouter_fallbacks_total", reason="radius") == 1
    assert since("fedrouter_fallbacks_total", reason="no_text") == 1
    assert since("fedrouter_distance_ratio_count", cluster="headline") >= 2
    assert since("fedrouter_routing_seconds_count") == 5


@pytest.mark.parametrize("path", ROUTED)
def test_counts_on_every_path(
    server: Server, adapter_of: Callable[[str], str], since: Since, path: str
) -> None:
    text = TASKS["summary"]
    body = {"model": "fedrouter", "prompt": text, "input": text, "max_tokens": 8}
    body["messages"] = [{"role": "user", "content": text}]

    async def one() -> None:
        async with server:
            await server.ask(path, body)
            await server.ask(path, {**body, "model": "base"})
            await server.ask(path, body, key="wrong")

    asyncio.run(one())
    assert since("fedrouter_requests_total", adapter=adapter_of("summary"), outcome="ok") == 1
    assert since("fedrouter_routing_seconds_count") == 1


def test_a_split_list_counts_for_each_adapter_and_each_prompt(
    make_server: Callable[..., Server], adapter_of: Callable[[str], str], since: Since, word_bundle: Bundle
) -> None:
    server = make_server(HolderApp(list(word_bundle.adapter_paths)))
    far = "zebra " * 50
    [answer] = ask(server, [TASKS["summary"], TASKS["headline"], TASKS["summary"], far, far])
    assert answer.status == 200
    for adapter in (adapter_of("summary"), adapter_of("headline"), "base"):
        assert since("fedrouter_requests_total", adapter=adapter, outcome="ok") == 1
    assert since("fedrouter_distance_ratio_count", cluster="summary") >= 2
    assert since("fedrouter_fallbacks_total", reason="radius") == 2
    assert since("fedrouter_routing_seconds_count") == 1


def test_counts_what_the_fallback_rejects(make_server: Callable[..., Server], since: Since) -> None:
    ask(make_server(fallback="reject"), "zebra " * 50)
    assert since("fedrouter_requests_total", adapter="reject", outcome="refused") == 1
    assert since("fedrouter_fallbacks_total", reason="radius") == 1


def test_counts_batches_and_empties_the_queue(server: Server, embedder: WordEmbedder, since: Since) -> None:
    ask(server, *[TASKS["headline"]] * 20)
    assert since("fedrouter_batch_size_count") == len(embedder.batches)
    assert since("fedrouter_batch_size_sum") == 20
    assert since("fedrouter_queue_depth") == 0


def test_counts_refused_requests(make_server: Callable[..., Server], since: Since) -> None:
    ask(make_server(max_body_mib=0.001), "x" * 5000)
    assert since("fedrouter_requests_total", adapter="", outcome="refused") == 1


def test_counts_overload_as_a_fallback(make_server: Callable[..., Server], since: Since) -> None:
    server = make_server(routing_timeout_s=1e-9)
    ask(server, TASKS["headline"])
    assert since("fedrouter_fallbacks_total", reason="overload") == 1
    assert since("fedrouter_queue_depth") == 0


def test_processes_are_added_up(tmp_path: Path) -> None:
    script = (
        "from fedrouter.serve import metrics\n"
        "metrics.count_request('a-1', 200); metrics.QUEUE.inc(2); metrics.BATCH.observe(3)\n"
        "metrics.ROUTING.observe(0.02)"
    )
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": str(DASHBOARD.parents[1])}
    for _ in range(3):
        subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))  # type: ignore[no-untyped-call]
    text = generate_latest(registry).decode()
    for line in (
        'fedrouter_requests_total{adapter="a-1",outcome="ok"} 3.0',
        "fedrouter_queue_depth 6.0",
        "fedrouter_batch_size_sum 9.0",
        'fedrouter_routing_seconds_bucket{le="0.025"} 3.0',
    ):
        assert line in text.splitlines(), text


def test_the_dashboard_asks_for_numbers_that_exist() -> None:
    queries = [
        target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]
    ]
    asked = {name for query in queries for name in re.findall(r"\bfedrouter_\w+", query)}
    described = {metric.name: metric.type for metric in REGISTRY.collect()}
    endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    there = {name + ending for name, kind in described.items() for ending in endings.get(kind, ())}
    assert asked
    assert asked <= there
    ours = {name for name in described if name.startswith("fedrouter_")}
    assert ours == {next(name for name in ours if one.startswith(name)) for one in asked}, (
        "the dashboard must show all"
    )
