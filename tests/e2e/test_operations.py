"""Living with a real vLLM: metrics, readiness, a new bundle without a restart."""

import json
import re
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
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
