"""Arithmetic on adapters, for server and clients, on plain arrays.

A client may train a lower rank than its task cluster has: the first *slices* of the adapter. A slice is one
row of A with the matching column of B. Each slice is averaged over the clients that have it.
"""

import math
from collections.abc import Sequence

import numpy as np

from fedrouter.types import AdapterState, Float64s


def average(adapters: Sequence[AdapterState], weights: Sequence[float]) -> AdapterState:
    """Return the weighted mean of A and of B (FedAvg, paper section 3), slice by slice.

    This is not the mean of the products BA: see ``exact`` and docs/internals/decisions.
    """
    shares = shares_of(adapters, weights)
    return {
        name: np.einsum("kr,krn->rn" if ".lora_A." in name else "kr,kmr->mr", shares, factors).astype(
            np.float32
        )
        for name in sorted(adapters[0])
        for factors in [stacked(adapters, name)]
    }


def rank_of(adapter: AdapterState) -> int:
    """Return an adapter's rank."""
    return next(len(array) for name, array in adapter.items() if ".lora_A." in name)


def cut(adapter: AdapterState, rank: int) -> AdapterState:
    """Return the first ``rank`` slices, as sent to a client of that rank."""
    return {name: array[:rank] if ".lora_A." in name else array[:, :rank] for name, array in adapter.items()}


def completed(adapter: AdapterState, whole: AdapterState) -> AdapterState:
    """Fill up an adapter of lower rank with the remaining slices of ``whole``."""
    rank = rank_of(adapter)
    return {
        name: np.concatenate([array, whole[name][rank:]])
        if ".lora_A." in name
        else np.concatenate([array, whole[name][:, rank:]], axis=1)
        for name, array in adapter.items()
    }


def clip(sent: AdapterState, adapter: AdapterState, norm: float) -> AdapterState:
    """Scale the update from ``sent`` to ``adapter`` down to L2 norm ``norm`` (over all weights) if longer."""
    length = distance(sent, adapter)
    if length <= norm:
        return adapter
    share = np.float32(norm / length)
    return {name: sent[name] + share * (array - sent[name]) for name, array in adapter.items()}


def distance(old: AdapterState, new: AdapterState) -> float:
    """Return the L2 norm of the difference over all weights."""
    return math.sqrt(sum(float(((new[n].astype(np.float64) - old[n]) ** 2).sum()) for n in old))


def update_of(sent: AdapterState, trained: AdapterState, names: Sequence[str]) -> Float64s:
    """Return the change of the tensors ``names`` as one vector."""
    return np.concatenate([(trained[n].astype(np.float64) - sent[n]).ravel() for n in names])


def updated(sent: AdapterState, update: Float64s, names: Sequence[str]) -> AdapterState:
    """Add an update, given as one vector, to the tensors ``names``."""
    parts = np.split(update, np.cumsum([sent[n].size for n in names])[:-1])
    return {
        n: (sent[n] + part.reshape(sent[n].shape)).astype(np.float32)
        for n, part in zip(names, parts, strict=True)
    }


def stack(adapters: Sequence[AdapterState], weights: Sequence[float]) -> AdapterState:
    """Return the adapter whose product is exactly Σ wᵢ BᵢAᵢ; its rank is the sum of the ranks (FLoRA)."""
    return {
        name: np.concatenate([s[name] for s in adapters])
        if ".lora_A." in name
        else np.concatenate([np.float32(w) * s[name] for s, w in zip(adapters, weights, strict=True)], axis=1)
        for name in sorted(adapters[0])
    }


def shares_of(adapters: Sequence[AdapterState], weights: Sequence[float]) -> Float64s:
    """Return each adapter's share in the mean of each slice: (k, r); columns sum to 1.

    The share is 0 where the adapter lacks the slice. An adapter of weight 0 counts only in slices that no
    other adapter has.
    """
    ranks = np.array([rank_of(adapter) for adapter in adapters])
    has = np.arange(ranks.max()) < ranks[:, None]
    shares = has * np.asarray(weights, dtype=np.float64)[:, None]
    total = shares.sum(0)
    return np.asarray(np.where(total > 0, shares, has) / np.where(total > 0, total, has.sum(0)))


def stacked(adapters: Sequence[AdapterState], name: str) -> Float64s:
    """Return one factor of all adapters, zero-padded to the highest rank: (k, r, n) or (k, m, r)."""
    axis = 0 if ".lora_A." in name else 1
    rank = max(state[name].shape[axis] for state in adapters)
    padded = []
    for array in (state[name] for state in adapters):
        missing = [(0, 0), (0, 0)]
        missing[axis] = (0, rank - array.shape[axis])
        padded.append(np.pad(array, missing))
    return np.stack(padded).astype(np.float64)
