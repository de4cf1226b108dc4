"""What noise promises: (ε, δ) by the accountant."""

import math
from collections import defaultdict
from collections.abc import Sequence

from fedrouter.config import Config, PrivacySettings
from fedrouter.errors import ConfigError
from fedrouter.train.federation import DISCOVERY_RELEASES
from fedrouter.train.server.loop import plan
from fedrouter.types import Assignment, Guarantee


def check_accountant(settings: PrivacySettings) -> None:
    """Refuse noise that nobody can account for.

    Raises
    ------
    ConfigError
        Without the accountant.
    """
    if settings.noisy:
        epsilon([1.0], settings.delta)


def guarantees(config: Config, assignments: Sequence[Assignment]) -> list[Guarantee]:
    """Return what a run's noise promises, each for the client that it protects least."""
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
    sent : towards the server.
    averaged : towards those who see the means alone, where all clients' noise comes together; empty where the
        server makes something else of updates than a mean.
    """
    noise = config.privacy.update_noise
    sent, averaged = defaultdict(list), defaultdict(list)
    for number in range(config.train.rounds):
        planned = plan(assignments, config.train, config.seed, number)
        for client, cluster, steps in planned:
            # Weights go with steps: replies with noise say no more than what was asked for.
            everyone = math.hypot(*(n for _, k, n in planned if k == cluster))
            sent[client].append(noise)
            averaged[client].append(noise * everyone / steps)
    how = config.aggregate
    if (how.method, how.robust, how.clip) != ("average", "none", None):
        averaged.clear()
    return tuple(max(m.values(), key=_loss, default=[]) for m in (sent, averaged))  # type: ignore[return-value]


def _loss(multipliers: Sequence[float]) -> float:
    return sum(m**-2 for m in multipliers)


def epsilon(multipliers: Sequence[float], delta: float) -> float:
    """Return the ε of Gaussian releases one after another, each with a noise multiplier of its own.

    Together they are one Gaussian release whose squared multiplier is the harmonic sum of theirs (Dong et al.
    2019, corollary 3.3); its ε is exact (Balle and Wang 2018).

    Raises
    ------
    ConfigError
        Without the accountant.
    """
    try:
        from dp_accounting import get_epsilon_gaussian
    except ImportError as error:
        raise ConfigError('noise needs an accountant: pip install "fedrouter[privacy]"') from error
    return float(get_epsilon_gaussian(1 / math.sqrt(_loss(multipliers)), delta))
