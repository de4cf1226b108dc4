"""From a prompt's vector to a decision with its reasons: the nearest centroid, found by FAISS. No HTTP."""

import faiss
import numpy as np

from fedrouter.bundle import FALLBACKS, GENERALIST, Bundle
from fedrouter.errors import ConfigError
from fedrouter.types import Array, Decision, RoutingSpace

BASE_NAME = "base"  # what the server calls the base model
REJECT = "reject"  # no model has this name: a decision that is not understood fails, and is not answered
CANDIDATES = 32  # centroids FAISS hands over; several may belong to one task cluster


def transform(space: RoutingSpace, embeddings: Array) -> Array:
    """Map embeddings (n, d) into the space where distances are measured: (n, m) float32."""
    return np.ascontiguousarray((embeddings - space.mean) @ space.transform, dtype=np.float32)


class Router:
    """Decides which adapter answers (paper section 3: argmin over the distance to the centroids).

    Not a classifier of what is right: beyond the nearest task cluster's radius it says so and falls back.
    """

    def __init__(self, bundle: Bundle, fallback: str | None = None):
        self.bundle = bundle
        self.fallback = fallback or bundle.fallback
        if self.fallback not in FALLBACKS:
            raise ConfigError(f"fallback {self.fallback!r} is none of {FALLBACKS}")
        if self.fallback == GENERALIST and bundle.generalist is None:
            raise ConfigError(f"fallback generalist: {bundle.path} holds no generalist adapter")
        # Who answers beyond every radius; None: the nearest adapter all the same.
        self._beyond = {"base": BASE_NAME, "generalist": bundle.generalist, "reject": REJECT}.get(
            self.fallback
        )
        self._cluster_of = np.asarray(bundle.space.cluster_of)
        self._index = faiss.IndexFlatL2(bundle.space.centroids.shape[1])
        self._index.add(np.ascontiguousarray(bundle.space.centroids))

    def route(self, embeddings: Array) -> list[Decision]:
        """Decide for each row of ``embeddings``, (n, d) float32, alike in any batch."""
        if not len(embeddings):
            return []
        z = transform(self.bundle.space, embeddings)
        # Cosmetic for few centroids, decisive for thousands; exact either way.
        _, found = self._index.search(z, min(CANDIDATES, self._index.ntotal))
        return [self._decide(row, candidates) for row, candidates in zip(z, found, strict=True)]

    def _decide(self, row: Array, candidates: np.ndarray) -> Decision:
        # FAISS computes squared distances in an order that depends on the batch; ours decide.
        difference = self.bundle.space.centroids[candidates].astype(np.float64) - row
        distances: dict[int, float] = {}
        for centroid, distance in zip(candidates, np.sqrt((difference**2).sum(axis=1)), strict=True):
            cluster = int(self._cluster_of[centroid])
            distances[cluster] = min(distances.get(cluster, np.inf), float(distance))
        ranked = sorted(distances, key=lambda k: (distances[k], k))
        nearest = self.bundle.clusters[ranked[0]]
        distance = distances[ranked[0]]
        beyond = bool(distance > nearest.radius)
        return Decision(
            model=(self._beyond if beyond else None) or nearest.adapter,
            cluster=nearest.name,
            distance=distance,
            radius=nearest.radius,
            margin=distances[ranked[1]] - distance if len(ranked) > 1 else float("inf"),
            fallback=beyond,
            distances={self.bundle.clusters[k].name: distances[k] for k in ranked},
        )
