"""Where a picture shows task clusters: two directions, taken from their centroids, never from rows."""

import numpy as np

from fedrouter.types import Array


def flat_map(centroids: Array) -> Array:
    """Return (m, 2): the two directions in which centroids (n, m) differ most (PCA), for pictures.

    Distances shrink in such a picture: what is drawn within a ring may lie beyond the radius.
    """
    _, _, directions = np.linalg.svd(centroids - centroids.mean(0), full_matrices=False)
    flat = np.zeros((centroids.shape[1], 2), dtype=np.float32)
    for column, row in enumerate(directions[:2]):
        flat[:, column] = row * np.sign(row[np.abs(row).argmax()] or 1)  # the same on every machine
    return flat
