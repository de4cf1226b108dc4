"""One adapter out of many, within a task cluster: means, exact and robust ones. Pure arrays.

Clients may train a lower rank than the task cluster has: see lora.py for *slices* and the plain mean.
"""

import math
from collections.abc import Sequence

import numpy as np

from fedrouter.config import AggregateSettings
from fedrouter.train.lora import average, rank_of, shares_of, stacked
from fedrouter.types import AdapterState, Float64s

FLOOR = 0.1  # least singular value of the new A's coordinates, relative to the largest
EMPTY = 1e-10  # a direction of the mean product that carries less, relative to the first, carries nothing


def aggregate(
    adapters: Sequence[AdapterState],
    weights: Sequence[float],
    settings: AggregateSettings,
    old: AdapterState | None = None,
) -> tuple[AdapterState, float | None]:
    """Return what ``settings`` make of one round's adapters, and the residual of ``exact``.

    Parameters
    ----------
    adapters : states with the same names and, but for the rank, shapes; finite, float32.
    weights : examples really trained, one an adapter, positive; robust means do not use them.
    old : the adapter of before, of the full rank; slices that nobody has stay as they are there.
    """
    if old is not None and max(map(rank_of, adapters)) < rank_of(old):
        adapters, weights = [*adapters, old], [*weights, 0.0]
    if settings.robust != "none":
        return robust_mean(adapters, settings.trim if settings.robust == "trimmed" else 0.5), None
    return mean(adapters, weights, settings.method)


def mean(
    adapters: Sequence[AdapterState], weights: Sequence[float], method: str
) -> tuple[AdapterState, float | None]:
    """Return the weighted mean by ``method``, "average" or "exact", and the residual of the latter."""
    return exact(adapters, weights) if method == "exact" else (average(adapters, weights), None)


def exact(adapters: Sequence[AdapterState], weights: Sequence[float]) -> tuple[AdapterState, float]:
    """Return the adapter whose product BA comes closest to the weighted mean of the products.

    The mean Σ wᵢ BᵢAᵢ = [w₁B₁ …][A₁; …] (FLoRA, Wang et al. 2024) is cut back to the rank by QR of both
    stacks and an SVD of the small core; no product is ever formed. The new A stays as close to the mean A as
    the product allows: training finds factors of the scale in which it left them, and where B is zero no
    direction of A is lost. Where ranks differ, the mean is that of slices, each over those who have it.

    Returns
    -------
    adapter : same names and shapes as the given ones, of the highest rank among them.
    residual : ‖mean − BA‖ / ‖mean‖, Frobenius, all modules together: what the rank leaves out.
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
    """Return the coordinate-wise trimmed mean (Yin et al. 2018); a ``trim`` of one half is the median.

    Every client counts alike: with weights, one that claims many examples would decide.

    Parameters
    ----------
    trim : share of the adapters that is cut off at each end, at least one where three or more are given.
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
    # Where the product is of a lower rank, A's other directions stay: B is zero there, and can grow again.
    spare = np.linalg.svd(like - like @ used.T @ used, full_matrices=False)[2][: min(rank, width) - num]
    rows = np.concatenate([used, spare])
    # Any invertible matrix between the factors leaves the product as it is: take the mean A's coordinates.
    p, scale, q = np.linalg.svd(like @ rows.T, full_matrices=False)
    scale = np.maximum(scale, FLOOR * scale[0])
    b = (left @ u[:, :num] * values[:num]) @ ((q.T / scale) @ p.T)[:num]
    return np.asarray(b), np.asarray((p * scale) @ q @ rows), values
