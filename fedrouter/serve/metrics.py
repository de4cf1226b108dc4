"""Prometheus metrics, on the server's own ``/metrics``; ``docs/grafana.json`` shows them.

They are in prometheus_client's default registry, which vLLM exposes. With several API processes vLLM sets
PROMETHEUS_MULTIPROC_DIR, and the values of all processes are summed.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.multiprocess import MultiProcessCollector

from fedrouter.types import Decision

REQUESTS = Counter("fedrouter_requests", "Routed requests, by adapter and outcome.", ["adapter", "outcome"])
FALLBACKS = Counter("fedrouter_fallbacks", "Prompts that fell back, by reason.", ["reason"])
RELOADS = Counter("fedrouter_reloads", "Requested reloads, by outcome.", ["outcome"])
ROUTING = Histogram(
    "fedrouter_routing_seconds",
    "Seconds from a request's body to its decision, including the wait in the queue.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
DISTANCE = Histogram(
    "fedrouter_distance_ratio",
    "Distance to the nearest task cluster ÷ its radius; above 1 is beyond the radius.",
    ["cluster"],
    buckets=(0.1, 0.25, 0.5, 0.75, 0.9, 1, 1.1, 1.25, 1.5, 2, 4),
)
BATCH = Histogram("fedrouter_batch_size", "Texts embedded together.", buckets=(1, 2, 4, 8, 16, 32))
FEEDBACK = Counter(
    "fedrouter_feedback", "First feedback on each response, by adapter and outcome.", ["adapter", "outcome"]
)
SHADOW = Counter(
    "fedrouter_shadow_decisions",
    "Decisions of the second bundle, by the first bundle's task cluster and the difference.",
    ["cluster", "difference"],
)
LOG_LOST = Counter("fedrouter_decision_log_lost", "Lines that could not be written to the decision log.")
QUEUE = Gauge("fedrouter_queue_depth", "Texts waiting to be embedded.", multiprocess_mode="livesum")


def count_decisions(decisions: Sequence[Decision], seconds: float, cause: str | None = None) -> None:
    """Count the decisions for one request.

    Parameters
    ----------
    seconds : duration of routing.
    cause : reason of all fallbacks, if not the decisions' own.
    """
    ROUTING.observe(seconds)
    for decision in decisions:
        if decision.fallback:
            FALLBACKS.labels(cause or reason(decision)).inc()
        if decision.radius > 0 and math.isfinite(decision.distance):
            DISTANCE.labels(decision.cluster).observe(decision.distance / decision.radius)


def count_request(adapter: str, status: int | None) -> None:
    """Count a routed request for one adapter.

    Parameters
    ----------
    adapter : the adapter that answered; empty if the request was refused before it was routed.
    status : HTTP status of the response; None if the client left before it.
    """
    REQUESTS.labels(adapter, outcome(status)).inc()


def outcome(status: int | None) -> str:
    """Return how a request ended, from the HTTP status; None if the client left before the response."""
    return "gone" if status is None else "ok" if status < 400 else "refused" if status < 500 else "failed"


def reason(decision: Decision) -> str:
    """Return why a decision falls back; empty if it does not."""
    return "" if not decision.fallback else "radius" if decision.cluster else "no_text"


def samples() -> list[dict[str, Any]]:
    """Return the current values of all FedRouter metrics, over all API processes."""
    registry = REGISTRY
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return [
        {"name": sample.name, "labels": sample.labels, "value": sample.value}
        for family in registry.collect()
        if family.name.startswith("fedrouter_")
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]
