"""What operators watch, on the server's own ``/metrics``.

Everything goes into prometheus_client's default registry, which vLLM exposes. With several API-server
processes vLLM sets PROMETHEUS_MULTIPROC_DIR before they start; then the numbers of all of them are added up,
ours included.
``docs/grafana.json`` shows them.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.multiprocess import MultiProcessCollector

from fedrouter.types import Decision

REQUESTS = Counter("fedrouter_requests", "Routed requests, by what answered and how.", ["adapter", "outcome"])
FALLBACKS = Counter("fedrouter_fallbacks", "Prompts that no task cluster's radius holds, by why.", ["reason"])
RELOADS = Counter("fedrouter_reloads", "New bundles asked for, by outcome.", ["outcome"])
ROUTING = Histogram(
    "fedrouter_routing_seconds",
    "From a request's body to its decision, the wait in the queue included.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
DISTANCE = Histogram(
    "fedrouter_distance_ratio",
    "Distance to the nearest task cluster ÷ its radius; above 1 is beyond it.",
    ["cluster"],
    buckets=(0.1, 0.25, 0.5, 0.75, 0.9, 1, 1.1, 1.25, 1.5, 2, 4),
)
BATCH = Histogram("fedrouter_batch_size", "Texts embedded together.", buckets=(1, 2, 4, 8, 16, 32))
FEEDBACK = Counter(
    "fedrouter_feedback", "Outcomes told of answers, by what answered.", ["adapter", "outcome"]
)
SHADOW = Counter(
    "fedrouter_shadow_decisions",
    "What the second bundle decided, by the first one's task cluster and how it differs.",
    ["cluster", "difference"],
)
LOG_LOST = Counter("fedrouter_decision_log_lost", "Lines that the decision log could not take.")
QUEUE = Gauge("fedrouter_queue_depth", "Texts that wait to be embedded.", multiprocess_mode="livesum")


def count_decisions(decisions: Sequence[Decision], seconds: float, why: str | None = None) -> None:
    """Count what was decided for one request.

    Parameters
    ----------
    seconds : that routing took.
    why : it falls back, where it is not the distance.
    """
    ROUTING.observe(seconds)
    for decision in decisions:
        if decision.fallback:
            FALLBACKS.labels(why or reason(decision)).inc()
        if decision.radius > 0 and math.isfinite(decision.distance):
            DISTANCE.labels(decision.cluster).observe(decision.distance / decision.radius)


def count_request(adapter: str, status: int | None) -> None:
    """Count one routed request; one that is split counts once for each adapter.

    Parameters
    ----------
    adapter : what answered; empty if the request was turned away before that was decided.
    status : of the answer; None if the client left without one.
    """
    REQUESTS.labels(adapter, outcome(status)).inc()


def outcome(status: int | None) -> str:
    """Return how a request ended, from its answer's status; None if the client left without one."""
    return "gone" if status is None else "ok" if status < 400 else "refused" if status < 500 else "failed"


def reason(decision: Decision) -> str:
    """Return why a decision falls back; empty if it does not."""
    return "" if not decision.fallback else "radius" if decision.cluster else "no_text"


def samples() -> list[dict[str, Any]]:
    """Return all of our numbers as they are now, over all API-server processes."""
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
