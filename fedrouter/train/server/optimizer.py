"""The server's optimizer: treats a round's mean update as a gradient (Reddi et al. 2021)."""

import numpy as np

from fedrouter.config import AggregateSettings
from fedrouter.types import AdapterState, Array

MOMENTUM = 0.9
SECOND_MOMENT_DECAY = 0.99
ADAPTIVITY = 1e-3  # τ: added to the root of the second moment
LEARNING_RATES = {"momentum": 1.0, "adam": 1e-3}


def server_step(
    current: AdapterState, target: AdapterState, moments: AdapterState, settings: AggregateSettings
) -> tuple[AdapterState, AdapterState]:
    """Move ``current`` towards ``target``, the mean of a round; without an optimizer ("none"), all the way.

    "momentum" is FedAvgM (Hsu et al. 2019). "adam" is FedAdam without bias correction, as in Reddi et al.
    2021.

    Parameters
    ----------
    moments : float32, as returned in the last round; empty in the first round.

    Returns
    -------
    adapter, moments : for the next round.
    """
    if settings.server == "none":
        return target, moments
    rate = settings.server_learning_rate or LEARNING_RATES[settings.server]
    adapter: dict[str, Array] = {}
    new_moments: dict[str, Array] = {}
    for name in sorted(current):
        change = target[name] - current[name]
        first = MOMENTUM * moments.get(f"first/{name}", np.zeros_like(change))
        if settings.server == "momentum":
            first = step = first + change
        else:
            first = first + (1 - MOMENTUM) * change
            second = (
                SECOND_MOMENT_DECAY * moments.get(f"second/{name}", np.zeros_like(change))
                + (1 - SECOND_MOMENT_DECAY) * change**2
            )
            step = first / (np.sqrt(second) + ADAPTIVITY)
            new_moments[f"second/{name}"] = second.astype(np.float32)
        new_moments[f"first/{name}"] = first.astype(np.float32)
        adapter[name] = (current[name] + rate * step).astype(np.float32)
    return adapter, new_moments
