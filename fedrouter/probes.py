"""Check of probes: is each conversation routed to its expected task cluster?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedrouter import conversation
from fedrouter.decide import verdict
from fedrouter.errors import DataError
from fedrouter.types import Decision, Probe

SHOWN = 60  # characters of a probe's text


@dataclass(frozen=True, slots=True)
class Asked:
    """A probe and the decision for it."""

    probe: Probe
    decision: Decision

    @property
    def holds(self) -> bool:
        """Whether the probe is routed as expected."""
        return self.decision.fallback == (self.probe.cluster is None) and (
            self.probe.cluster in (None, self.decision.cluster)
        )

    def __str__(self) -> str:
        text = self.probe.turns[-1] if self.probe.turns else ""
        text = text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
        to = "the fallback" if self.decision.fallback else self.decision.cluster
        wanted = self.probe.cluster or "the fallback"
        near = f"{verdict(self.decision)} of {self.decision.cluster}" if self.decision.cluster else "no text"
        expected = "as expected" if self.holds else f"expected {wanted}"
        return f"{self.probe.where} ({text!r}) goes to {to} ({near}), {expected}"


def check_clusters(probes: Sequence[Probe], clusters: Sequence[str], file: Path) -> None:
    """Refuse probes that expect a task cluster which does not exist.

    Raises
    ------
    DataError
        If there is one; names its line and the task clusters.
    """
    for probe in probes:
        if probe.cluster not in (None, *clusters):
            raise DataError(
                f"{file}, {probe.where}: no task cluster {probe.cluster!r} in the bundle; "
                f"it has {', '.join(clusters)}"
            )


async def ask(probes: Sequence[Probe], route: conversation.Route) -> list[Asked]:
    """Decide for each probe.

    Parameters
    ----------
    route : decides for single texts.
    """
    decisions = await conversation.route_by_turns([probe.turns for probe in probes], route) if probes else []
    return [Asked(probe, decision) for probe, decision in zip(probes, decisions, strict=True)]
