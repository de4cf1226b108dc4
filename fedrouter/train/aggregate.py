"""Averaging adapters within a task cluster: pure arrays."""

from collections.abc import Sequence

import numpy as np

from fedrouter.errors import TrainingError
from fedrouter.types import AdapterState


def average(adapters: Sequence[AdapterState], weights: Sequence[float]) -> AdapterState:
    """Return the weighted mean of A and of B (paper section 3, as FedAvg).

    Not the mean of the products BA: see docs/decisions.

    Parameters
    ----------
    adapters : states with the same names and shapes, float32.
    weights : examples really trained, one an adapter, positive.

    Raises
    ------
    TrainingError
        If an adapter has other names or shapes than the first, or a value that is not finite.
    """
    first = adapters[0]
    for state in adapters:
        if state.keys() != first.keys() or any(state[n].shape != first[n].shape for n in first):
            raise TrainingError(
                "an update has other tensor names or shapes than the adapter that was sent out"
            )
        if not all(np.isfinite(array).all() for array in state.values()):
            raise TrainingError("an update holds values that are not finite; lower train.learning_rate")
    shares = np.asarray(weights, dtype=np.float64)
    shares = shares / shares.sum()
    return {
        name: np.tensordot(shares, np.stack([s[name] for s in adapters]).astype(np.float64), axes=1).astype(
            np.float32
        )
        for name in sorted(first)
    }
