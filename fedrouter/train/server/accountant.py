"""Privacy accounting: the (ε, δ) guarantees of a run's noise."""

import math
from collections import defaultdict
from collections.abc import Sequence

from fedrouter.config import Config, PrivacySettings
from fedrouter.errors import ConfigError
from fedrouter.train.federation import DISCOVERY_RELEASES
from fedrouter.train.server.loop import plan
from fedrouter.types import Assignment, Guarantee


def check_accountant(settings: PrivacySettings) -> None:
    """Raise ConfigError if noise is set but the accounting package is not installed."""
    if settings.noisy:
        epsilon([1.0], settings.delta)


def guarantees(config: Config, assignments: Sequence[Assignment]) -> list[Guarantee]:
    """Return a run's privacy guarantees, each for the client that it protects least."""
    settings = config.privacy
    before = [settings.centroid_noise] * DISCOVERY_RELEASES if settings.centroid_noise else []
    sent, averaged = _updates(config, assignments) if settings.update_noise else ([], [])
    promised = []
    for unit, covers, multipliers in (
        ("row", "what is sent before the rounds", before),
        ("client", "its updates, given what was sent before the rounds", sent),
        ("client", "its updates, for those who see averages only, if nobody fails", averaged),
        ("row", "the whole run", [*before, *sent] if before and sent else []),
    ):
        if multipliers:
            found = epsilon(multipliers, settings.delta)
            promised.append(Guarantee(unit, covers, len(multipliers), round(found, 4), settings.delta))
    return promised


def _updates(config: Config, assignments: Sequence[Assignment]) -> tuple[list[float], list[float]]:
    """Return the noise multipliers of the updates of the client that is protected least.

    Returns
    -------
    sent : against the server.
    averaged : against those who see only the means, which contain all clients' noise; empty unless the server
        takes plain means.
    """
    noise = config.privacy.update_noise
    sent, averaged = defaultdict(list), defaultdict(list)
    for number in range(config.train.rounds):
        planned = plan(assignments, config.train, config.seed, number)
        for client, cluster, steps in planned:
            # Weights are proportional to steps: noisy replies claim exactly the requested examples.
            total = math.hypot(*(n for _, k, n in planned if k == cluster))
            sent[client].append(noise)
            averaged[client].append(noise * total / steps)
    aggregate = config.aggregate
    if (aggregate.method, aggregate.robust, aggregate.clip) != ("average", "none", None):
        averaged.clear()
    return tuple(max(m.values(), key=_loss, default=[]) for m in (sent, averaged))  # type: ignore[return-value]


def _loss(multipliers: Sequence[float]) -> float:
    return sum(m**-2 for m in multipliers)


def epsilon(multipliers: Sequence[float], delta: float) -> float:
    """Return the ε of a sequence of Gaussian releases with the given noise multipliers.

    Together they equal one Gaussian release with multiplier 1/√(Σ 1/mᵢ²) (Dong et al. 2019, corollary 3.3),
    whose ε is exact (Balle and Wang 2018).

    Raises
    ------
    ConfigError
        If the accounting package is not installed.
    """
    try:
        from dp_accounting import get_epsilon_gaussian
    except ImportError as error:
        raise ConfigError('noise needs the accounting package: pip install "fedrouter[privacy]"') from error
    return float(get_epsilon_gaussian(1 / math.sqrt(_loss(multipliers)), delta))
