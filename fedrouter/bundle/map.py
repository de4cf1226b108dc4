"""The plane on which figures show task clusters, computed from centroids and never from rows."""

import numpy as np

from fedrouter.types import Array


def flat_map(centroids: Array) -> Array:
    """Return the first two principal components (m, 2) of centroids (n, m), for figures.

    The projection shortens distances: a point drawn within a ring may lie beyond the radius.
    """
    _, _, directions = np.linalg.svd(centroids - centroids.mean(0), full_matrices=False)
    flat = np.zeros((centroids.shape[1], 2), dtype=np.float32)
    for column, row in enumerate(directions[:2]):
        flat[:, column] = row * np.sign(row[np.abs(row).argmax()] or 1)  # fixes the sign on every machine
    return flat
