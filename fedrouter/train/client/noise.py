"""Clipping and noise on the client, for (ε, δ)-differential privacy.

Every noisy value is a Gaussian release: a sum over rows, or an update. Replacing one row (or all rows of a
client) changes it by at most ``sensitivity``, and the noise's standard deviation is the multiplier times
``sensitivity``. Rows are grouped only by earlier releases (Blum et al. 2005); scikit-learn's k-means groups
by the rows themselves and would give no guarantee. The number of a client's rows is not protected.
"""

import hmac
from collections.abc import Sequence

import numpy as np
from sklearn.isotonic import isotonic_regression
from sklearn.metrics import pairwise_distances_argmin

from fedrouter.config import PrivacySettings
from fedrouter.train.federation import NOISY_STEPS, QUANTILES
from fedrouter.train.lora import clip, update_of, updated
from fedrouter.train.space import Labels, nearest, only
from fedrouter.types import AdapterState, Array, Float64s, LocalClusters, RoutingSpace, Subset

NUM_BINS = 40  # for distances, up to the largest possible one between two clipped rows


class Noise:
    """One client's noise: the same for the same release, and independent for any other.

    A resumed run repeats its releases byte for byte, so noise cannot be averaged out by asking again. The
    generator is seeded by an HMAC of the released value, so only a holder of the key can remove the noise.

    Parameters
    ----------
    key : the client's secret, which never leaves it.
    """

    def __init__(self, key: bytes, client: str):
        self._key, self._client = key, client

    def release(self, value: Float64s, sensitivity: float, multiplier: float, *asked: object) -> Float64s:
        """Return ``value`` with Gaussian noise of standard deviation ``multiplier * sensitivity``.

        Parameters
        ----------
        asked : values that distinguish this release from the client's other releases.
        """
        text = "/".join(map(str, (self._client, *asked, value.shape))).encode()
        digest = hmac.digest(self._key, text + b"\0" + value.tobytes(), "sha256")
        rng = np.random.default_rng(int.from_bytes(digest))
        return np.asarray(value + rng.normal(0, multiplier * sensitivity, value.shape))


def summarise(
    x: Array, centre: Float64s, num: int, seed: int, privacy: PrivacySettings, noise: Noise
) -> LocalClusters:
    """Group a client's rows into local clusters by k-means in which every step is a Gaussian release.

    Parameters
    ----------
    x : (n, d) float32, embedded prompts.
    centre : (d,) rows are clipped around it; equal for all clients and not computed from rows.
    seed : for the directions in which the mean is first split; not secret.
    """
    assert privacy.clip_embeddings is not None, "the configuration refuses this"
    z = (x.astype(np.float64) - centre) / privacy.clip_embeddings
    z /= np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1)  # rows of length 1 at most
    weighted = np.c_[np.ones(len(z)), z]

    def step(labels: Labels, count: int, *asked: object) -> tuple[Float64s, Float64s]:
        sums = np.zeros((count, weighted.shape[1]))
        np.add.at(sums, labels, weighted)
        # A row adds (1, z) to one sum, so replacing it changes the sums by at most 2.
        sums = noise.release(sums, 2, privacy.centroid_noise, "summarise", num, *asked)
        means = sums[:, 1:] / np.maximum(sums[:, :1], 1)
        return sums[:, 0], means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1)

    _, mean = step(np.zeros(len(z), dtype=np.int64), 1, "mean")
    directions = np.random.default_rng(seed).normal(size=(num, z.shape[1]))
    means = mean + 1e-6 * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    for number in range(NOISY_STEPS):
        labels = pairwise_distances_argmin(z, means)
        counts, moved = step(labels, num, number)
        means = np.where((counts >= privacy.min_cluster_size)[:, None], moved, means)
    kept = counts >= min(privacy.min_cluster_size, counts.max())
    d = z.shape[1]
    return LocalClusters(
        np.maximum(counts[kept], 1), means[kept] * privacy.clip_embeddings + centre, np.zeros((d, d))
    )


def assign(
    x: Array, space: RoutingSpace, privacy: PrivacySettings, noise: Noise
) -> tuple[dict[int, Labels], tuple[Subset, ...]]:
    """Assign each row to the nearest task cluster whose noisy count is large enough to be revealed.

    Returns
    -------
    rows : row numbers by task cluster, for the client only.
    subsets : noisy counts and distance quantiles without task labels, which the client reveals.
    """
    assert privacy.clip_embeddings is not None, "the configuration refuses this"
    centroid, distance = nearest(x, space)
    labels, num = np.asarray(space.cluster_of)[centroid], space.num_clusters
    edges = np.linspace(0, 2 * privacy.clip_embeddings, NUM_BINS + 1)
    bins = np.clip(np.searchsorted(edges, distance, side="right") - 1, 0, NUM_BINS - 1)
    counts = np.zeros((num, NUM_BINS))
    np.add.at(counts, (labels, bins), 1)
    # A row adds 1 to one bin, so replacing it changes two bins by 1.
    counts = noise.release(counts, np.sqrt(2), privacy.centroid_noise, "assign", space.centroids.tobytes())
    sizes = counts.sum(1)
    large = np.flatnonzero(sizes >= min(privacy.min_cluster_size, sizes.max()))
    enough = only(space, large)
    labels = np.asarray(enough.cluster_of)[nearest(x, enough)[0]]
    subsets = []
    for k in large:
        below = np.maximum(isotonic_regression(np.r_[0, counts[k].cumsum()]), 0)
        share = below / max(below[-1], 1e-12) + 1e-9 * np.arange(NUM_BINS + 1)  # strictly rising
        quantiles = np.interp(QUANTILES, share, edges).astype(np.float32)
        subsets.append(Subset(int(k), max(round(sizes[k]), 1), quantiles, {}))
    return {int(k): np.flatnonzero(labels == k) for k in large}, tuple(subsets)


def update(
    sent: AdapterState,
    trained: AdapterState,
    names: Sequence[str],
    privacy: PrivacySettings,
    noise: Noise,
    *asked: object,
) -> AdapterState:
    """Return the trained adapter with its update clipped and, with ``privacy.update_noise``, noise added.

    Parameters
    ----------
    names : names of the trained tensors; a frozen A gets no noise.
    """
    assert privacy.clip_updates is not None, "the configuration refuses this"
    clipped = clip(sent, trained, privacy.clip_updates)
    if not privacy.update_noise:
        return clipped
    flat = update_of(sent, clipped, names)
    # Any two clipped updates differ by at most twice the clipping norm.
    flat = noise.release(flat, 2 * privacy.clip_updates, privacy.update_noise, "update", *asked)
    return {**clipped, **updated(sent, flat, names)}
