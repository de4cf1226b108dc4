"""Aggregate the adapters of a task cluster, on plain arrays: plain, exact and robust means.

Clients may train a lower rank than the task cluster has: see lora.py for *slices* and the plain mean.
"""

import math
from collections.abc import Sequence

import numpy as np

from fedrouter.config import AggregateSettings
from fedrouter.train.lora import average, rank_of, shares_of, stacked
from fedrouter.types import AdapterState, Float64s

FLOOR = 0.1  # minimum singular value of the new A's coordinates, relative to the largest
EMPTY = 1e-10  # singular values of the mean product below this, relative to the first, count as zero


def aggregate(
    adapters: Sequence[AdapterState],
    weights: Sequence[float],
    settings: AggregateSettings,
    old: AdapterState | None = None,
) -> tuple[AdapterState, float | None]:
    """Aggregate one round's adapters by ``settings``; also return the residual of ``exact``, else None.

    Parameters
    ----------
    adapters : states with equal names and, except for the rank, equal shapes; finite, float32.
    weights : number of examples trained for each adapter, positive; robust means ignore them.
    old : the previous adapter, of full rank; it provides slices that no other adapter has.
    """
    if old is not None and max(map(rank_of, adapters)) < rank_of(old):
        adapters, weights = [*adapters, old], [*weights, 0.0]
    if settings.robust != "none":
        return robust_mean(adapters, settings.trim if settings.robust == "trimmed" else 0.5), None
    return mean(adapters, weights, settings.method)


def mean(
    adapters: Sequence[AdapterState], weights: Sequence[float], method: str
) -> tuple[AdapterState, float | None]:
    """Return the weighted mean by ``method``, and the residual of "exact" (None with "average")."""
    return exact(adapters, weights) if method == "exact" else (average(adapters, weights), None)


def exact(adapters: Sequence[AdapterState], weights: Sequence[float]) -> tuple[AdapterState, float]:
    """Return the adapter whose product BA is closest to the weighted mean of the products.

    The mean Σ wᵢ BᵢAᵢ = [w₁B₁ …][A₁; …] (FLoRA, Wang et al. 2024) is reduced to the rank by QR of both stacks
    and an SVD of the small core, without forming a product. The new A stays as close to the mean A as the
    product allows: this keeps the scale of the factors for further training, and loses no direction of A
    where B is zero. If ranks differ, each slice is averaged over the adapters that have it.

    Returns
    -------
    adapter : same names and shapes as the given ones, of the highest rank among them.
    residual : ‖mean − BA‖ / ‖mean‖, Frobenius norm over all modules: the error from reducing the rank.
    """
    shares = shares_of(adapters, weights)
    result: dict[str, np.ndarray] = {}
    left_out = total = 0.0
    for name_a in sorted(name for name in adapters[0] if ".lora_A." in name):
        name_b = name_a.replace(".lora_A.", ".lora_B.")
        each_a = stacked(adapters, name_a)  # (k, r, n)
        stack_a = np.concatenate(each_a)  # (k r, n)
        stack_b = np.concatenate(list(shares[:, None] * stacked(adapters, name_b)), axis=1)  # (m, k r)
        like = np.asarray(np.einsum("kr,krn->rn", shares, each_a))
        b, a, values = _closest(stack_b, stack_a, like)
        result[name_a], result[name_b] = a.astype(np.float32), b.astype(np.float32)
        left_out += float((values[len(like) :] ** 2).sum())
        total += float((values**2).sum())
    return {name: result[name] for name in sorted(result)}, math.sqrt(left_out / total) if total else 0.0


def robust_mean(adapters: Sequence[AdapterState], trim: float) -> AdapterState:
    """Return the coordinate-wise trimmed mean (Yin et al. 2018); a ``trim`` of one half gives the median.

    Clients are not weighted: otherwise one that claims many examples would decide the result.

    Parameters
    ----------
    trim : share of the adapters removed at each end, rounded up; at least one adapter is kept.
    """
    num = len(adapters)
    cut = min(math.ceil(trim * num), (num - 1) // 2)
    return {
        name: np.sort(stacked(adapters, name), axis=0)[cut : num - cut].mean(axis=0).astype(np.float32)
        for name in sorted(adapters[0])
    }


def _closest(stack_b: Float64s, stack_a: Float64s, like: Float64s) -> tuple[Float64s, Float64s, Float64s]:
    """Return B (m, r), A (r, n) with BA closest to stack_b @ stack_a, and all its singular values."""
    rank, width = like.shape
    left, core_b = np.linalg.qr(stack_b)
    right, core_a = np.linalg.qr(stack_a.T)
    u, values, vt = np.linalg.svd(core_b @ core_a.T, full_matrices=False)
    num = min(rank, int((values > EMPTY * values[0]).sum()))
    used = vt[:num] @ right.T  # (num, n), orthonormal rows
    # If the product has a lower rank, keep A's remaining directions: B is zero there but can grow again.
    spare = np.linalg.svd(like - like @ used.T @ used, full_matrices=False)[2][: min(rank, width) - num]
    rows = np.concatenate([used, spare])
    # An invertible matrix between the factors does not change the product: use the mean A's coordinates.
    p, scale, q = np.linalg.svd(like @ rows.T, full_matrices=False)
    scale = np.maximum(scale, FLOOR * scale[0])
    b = (left @ u[:, :num] * values[:num]) @ ((q.T / scale) @ p.T)[:num]
    return np.asarray(b), np.asarray((p * scale) @ q @ rows), values
