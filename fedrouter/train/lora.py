"""Arithmetic on adapters, for both sides. Pure arrays.

Clients may train a lower rank than the task cluster has: the first *slices* of its adapter, a slice being one
row of A with its column of B. Each slice is then averaged over the clients that have it.
"""

import math
from collections.abc import Sequence

import numpy as np

from fedrouter.types import AdapterState, Float64s


def average(adapters: Sequence[AdapterState], weights: Sequence[float]) -> AdapterState:
    """Return the weighted mean of A and of B (paper section 3, as FedAvg), each slice over those who have it.

    Not the mean of the products BA: see ``exact`` and docs/internals/decisions.
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
    """Return the first ``rank`` slices: what a client of that rank is sent."""
    return {name: array[:rank] if ".lora_A." in name else array[:, :rank] for name, array in adapter.items()}


def completed(adapter: AdapterState, whole: AdapterState) -> AdapterState:
    """Return an adapter of fewer slices with the others of ``whole``."""
    rank = rank_of(adapter)
    return {
        name: np.concatenate([array, whole[name][rank:]])
        if ".lora_A." in name
        else np.concatenate([array, whole[name][:, rank:]], axis=1)
        for name, array in adapter.items()
    }


def clip(sent: AdapterState, adapter: AdapterState, norm: float) -> AdapterState:
    """Shorten an update that is longer than ``norm`` (L2, all weights together)."""
    length = distance(sent, adapter)
    if length <= norm:
        return adapter
    share = np.float32(norm / length)
    return {name: sent[name] + share * (array - sent[name]) for name, array in adapter.items()}


def distance(old: AdapterState, new: AdapterState) -> float:
    """Return the L2 norm of the difference, all weights together."""
    return math.sqrt(sum(float(((new[n].astype(np.float64) - old[n]) ** 2).sum()) for n in old))


def update_of(sent: AdapterState, trained: AdapterState, names: Sequence[str]) -> Float64s:
    """Return how the tensors ``names`` have changed, as one vector."""
    return np.concatenate([(trained[n].astype(np.float64) - sent[n]).ravel() for n in names])


def updated(sent: AdapterState, update: Float64s, names: Sequence[str]) -> AdapterState:
    """Return the tensors ``names`` with an update given as one vector."""
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
    """(k, r): each adapter's share in each slice, 0 where it has none; slices sum to 1.

    A weight of 0 counts only in slices that nobody else has.
    """
    ranks = np.array([rank_of(adapter) for adapter in adapters])
    has = np.arange(ranks.max()) < ranks[:, None]
    shares = has * np.asarray(weights, dtype=np.float64)[:, None]
    total = shares.sum(0)
    return np.asarray(np.where(total > 0, shares, has) / np.where(total > 0, total, has.sum(0)))


def stacked(adapters: Sequence[AdapterState], name: str) -> Float64s:
    """Return all adapters' factors, the smaller ones filled up with zeros: (k, r, n) or (k, m, r)."""
    axis = 0 if ".lora_A." in name else 1
    rank = max(state[name].shape[axis] for state in adapters)
    filled = []
    for array in (state[name] for state in adapters):
        missing = [(0, 0), (0, 0)]
        missing[axis] = (0, rank - array.shape[axis])
        filled.append(np.pad(array, missing))
    return np.stack(filled).astype(np.float64)
