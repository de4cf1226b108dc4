"""Vectors → decisions: the nearest centroid, found with FAISS. No HTTP."""

import faiss
import numpy as np

from fedrouter.bundle import FALLBACKS, GENERALIST, Bundle
from fedrouter.errors import ConfigError
from fedrouter.types import Array, Decision, RoutingSpace

BASE_NAME = "base"  # the server's model name for the base model
REJECT = "reject"  # no model has this name, so a request fails if a caller does not handle the rejection
CANDIDATES = 32  # centroids taken from FAISS; several may belong to one task cluster


def transform(space: RoutingSpace, embeddings: Array) -> Array:
    """Map embeddings (n, d) to the routing space: (n, m) float32."""
    return np.ascontiguousarray((embeddings - space.mean) @ space.transform, dtype=np.float32)


class Router:
    """Decides which adapter answers (paper section 3: argmin over the distance to the centroids).

    Beyond the nearest task cluster's radius it decides for the fallback.

    Parameters
    ----------
    fallback : replaces the bundle's fallback.
    client : restricts decisions to the task clusters with rows of this client (paper: local mode).

    Raises
    ------
    ConfigError
        If the fallback is unknown or needs a generalist that the bundle lacks, or no task cluster has rows
        of the client.
    """

    def __init__(self, bundle: Bundle, fallback: str | None = None, client: str | None = None):
        self.bundle = bundle
        self.fallback = fallback or bundle.fallback
        if self.fallback not in FALLBACKS:
            raise ConfigError(f"fallback {self.fallback!r} is not one of {', '.join(FALLBACKS)}")
        if self.fallback == GENERALIST and bundle.generalist is None:
            raise ConfigError(
                f"fallback generalist: {bundle.path} contains no generalist adapter; choose another fallback"
            )
        # The model that answers beyond the radius; None: the nearest task cluster's adapter.
        self.beyond = {"base": BASE_NAME, "generalist": bundle.generalist, "reject": REJECT}.get(
            self.fallback
        )
        allowed = [client is None or client in cluster.clients for cluster in bundle.clusters]
        if not any(allowed):
            raise ConfigError(f"{bundle.path}: no task cluster has rows of client {client!r}")
        cluster_of = np.asarray(bundle.space.cluster_of)
        rows = np.asarray(allowed)[cluster_of]
        self._cluster_of = cluster_of[rows]
        self._centroids = np.ascontiguousarray(bundle.space.centroids[rows])
        self._index = faiss.IndexFlatL2(self._centroids.shape[1])
        self._index.add(self._centroids)

    def route(self, embeddings: Array) -> list[Decision]:
        """Decide for each row of ``embeddings``, (n, d) float32, independently of the batch."""
        if not len(embeddings):
            return []
        z = transform(self.bundle.space, embeddings)
        # Only worth it for thousands of centroids; exact in any case.
        _, found = self._index.search(z, min(CANDIDATES, self._index.ntotal))
        return [self._decision(row, candidates) for row, candidates in zip(z, found, strict=True)]

    def _decision(self, row: Array, candidates: np.ndarray) -> Decision:
        # Recomputed, because the rounding of FAISS's distances depends on the batch.
        difference = self._centroids[candidates].astype(np.float64) - row
        distances: dict[int, float] = {}
        for centroid, distance in zip(candidates, np.sqrt((difference**2).sum(axis=1)), strict=True):
            cluster = int(self._cluster_of[centroid])
            distances[cluster] = min(distances.get(cluster, np.inf), float(distance))
        ranked = sorted(distances, key=lambda k: (distances[k], k))
        nearest = self.bundle.clusters[ranked[0]]
        distance = distances[ranked[0]]
        beyond = bool(distance > nearest.radius)
        return Decision(
            model=(self.beyond if beyond else None) or nearest.adapter,
            cluster=nearest.name,
            distance=distance,
            radius=nearest.radius,
            margin=distances[ranked[1]] - distance if len(ranked) > 1 else float("inf"),
            fallback=beyond,
            distances={self.bundle.clusters[k].name: distances[k] for k in ranked},
        )
