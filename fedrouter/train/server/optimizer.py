"""The server's optimizer: what a round's mean changes is taken for a gradient (Reddi et al. 2021)."""

import numpy as np

from fedrouter.config import AggregateSettings
from fedrouter.types import AdapterState, Array

MOMENTUM = 0.9
SECOND = 0.99
ADAPTIVITY = 1e-3  # τ: added to the root of the second moment
LEARNING_RATES = {"momentum": 1.0, "adam": 1e-3}


def server_step(
    current: AdapterState, wanted: AdapterState, moments: AdapterState, settings: AggregateSettings
) -> tuple[AdapterState, AdapterState]:
    """Go from ``current`` towards ``wanted``, the mean of a round; "none" goes all the way.

    "momentum" is FedAvgM (Hsu et al. 2019), "adam" FedAdam (Reddi et al. 2021), as there without bias
    correction.

    Parameters
    ----------
    moments : float32, as this function returned them in the last round; empty in the first.

    Returns
    -------
    adapter, moments : both go into the next round.
    """
    if settings.server == "none":
        return wanted, moments
    rate = settings.server_learning_rate or LEARNING_RATES[settings.server]
    adapter: dict[str, Array] = {}
    kept: dict[str, Array] = {}
    for name in sorted(current):
        change = wanted[name] - current[name]
        first = MOMENTUM * moments.get(f"first/{name}", np.zeros_like(change))
        if settings.server == "momentum":
            first = step = first + change
        else:
            first = first + (1 - MOMENTUM) * change
            second = SECOND * moments.get(f"second/{name}", np.zeros_like(change)) + (1 - SECOND) * change**2
            step = first / (np.sqrt(second) + ADAPTIVITY)
            kept[f"second/{name}"] = second.astype(np.float32)
        kept[f"first/{name}"] = first.astype(np.float32)
        adapter[name] = (current[name] + rate * step).astype(np.float32)
    return adapter, kept
