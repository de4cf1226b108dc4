"""Small fakes that really embed and train, on a scale that a test can check by hand."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedrouter.bundle import Bundle, write_bundle
from fedrouter.config import Count
from fedrouter.train.client import cluster
from fedrouter.types import (
    AdapterState,
    Array,
    Assignment,
    BaseSpec,
    Comparison,
    EmbedderSpec,
    LocalClusters,
    Member,
    Membership,
    Reread,
    RoutingSpace,
    TaskCluster,
    TrainFailure,
    TrainReply,
    TrainRequest,
    ValidationReply,
    ValidationRequest,
)

DIM = 8
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


class LetterEmbedder:
    """Counts the letters a–h of a text: a deterministic embedding with eight dimensions."""

    spec = EmbedderSpec(
        kind="base", model="letters", layer=1, max_tokens=512, dtype="float32", dim=DIM, fingerprint="letters"
    )

    def embed(self, texts: Sequence[str]) -> Array:
        return np.array([[t.count(c) for c in "abcdefgh"] for t in texts], dtype=np.float32).reshape(-1, DIM)


def adapter(seed: int, rank: int = 2, width: int = 6) -> AdapterState:
    """A LoRA state of one module with random factors."""
    rng = np.random.default_rng(seed)
    return {
        f"{MODULE}.lora_A.weight": rng.normal(size=(rank, width)).astype(np.float32),
        f"{MODULE}.lora_B.weight": rng.normal(size=(width, rank)).astype(np.float32),
    }


def space(centroids: NDArray[Any], cluster_of: Sequence[int] | None = None) -> RoutingSpace:
    """A routing space without a transform."""
    dim = centroids.shape[1]
    return RoutingSpace(
        mean=np.zeros(dim, dtype=np.float32),
        transform=np.eye(dim, dtype=np.float32),
        centroids=centroids.astype(np.float32),
        cluster_of=tuple(range(len(centroids))) if cluster_of is None else tuple(cluster_of),
    )


def write(path: Path, routing: RoutingSpace, radii: Sequence[float], **changes: object) -> Bundle:
    """Write a small bundle with one random adapter per task cluster."""
    clusters = [TaskCluster(f"task-{k}", "", 10, ("client-0",), {}, radius) for k, radius in enumerate(radii)]
    arguments: dict[str, object] = {
        "base": BaseSpec("fake", None, "0" * 32),
        "embedder": replace(LetterEmbedder.spec, dim=routing.transform.shape[0]),
        "clusters": clusters,
        "adapters": [adapter(k) for k in range(len(radii))],
        "adapter_config": {"r": 2, "lora_alpha": 4, "peft_type": "LORA", "target_modules": ["q_proj"]},
        "space": routing,
        "probe_vectors": np.ones((3, routing.transform.shape[0]), dtype=np.float32),
        "fallback": "base",
        "versions": {},
    }
    return write_bundle(path, **{**arguments, **changes})  # type: ignore[arg-type]


class Unasked:
    """A federation that is asked nothing."""

    def members(self) -> Sequence[Member]:
        raise NotImplementedError

    def reread(self) -> Sequence[Reread]:
        raise NotImplementedError

    def compare(self, space: RoutingSpace, radii: Sequence[float]) -> Sequence[Comparison]:
        raise NotImplementedError

    def summarise_beyond(self, num: Count) -> Iterable[LocalClusters]:
        raise NotImplementedError

    def leave(self, names: Collection[str]) -> None:
        raise NotImplementedError

    def validate(self, requests: Sequence[ValidationRequest]) -> Iterator[ValidationReply | TrainFailure]:
        raise NotImplementedError


class PullFederation(Unasked):
    """Clients whose training steps move the adapter half of the way to the client's target."""

    def __init__(self, vectors: dict[str, Array], targets: dict[str, AdapterState]):
        self.vectors, self.targets = vectors, targets
        self.requests: list[TrainRequest] = []

    def summarise(self, num: Count) -> list[LocalClusters]:
        return [cluster.summarise(x, num, seed=0) for x in self.vectors.values()]

    def regroup(self, space: RoutingSpace, membership: Membership | None = None) -> list[LocalClusters]:
        assert membership is None
        return [cluster.regroup(x, space) for x in self.vectors.values()]

    def assign(self, space: RoutingSpace, membership: Membership | None = None) -> list[Assignment]:
        assert membership is None
        return [Assignment(c, cluster.assign(x, space, [None] * len(x))[1]) for c, x in self.vectors.items()]

    def train(self, requests: Sequence[TrainRequest]) -> Iterator[TrainReply | TrainFailure]:
        return self.pulled(requests)

    def pulled(self, requests: Sequence[TrainRequest]) -> Iterator[TrainReply]:
        self.requests += requests
        for r in reversed(requests):  # replies may arrive in any order
            share = 1 - 0.5**r.steps
            new = {n: a + np.float32(share) * (self.targets[r.client][n] - a) for n, a in r.adapter.items()}
            yield TrainReply(r.client, r.cluster, new, r.steps * 4, 0.5**r.round, 0.0)
