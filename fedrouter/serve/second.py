"""A second bundle beside the served one: it decides as well, and answers a share of the requests, or none."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedrouter.serve.access import Caller
from fedrouter.serve.routing import Routing
from fedrouter.serve.settings import Settings


@dataclass(frozen=True, slots=True)
class Second:
    """What decides beside the first bundle."""

    routing: Routing
    share: float  # of the requests, 0 to 1, that it answers; with 0 the server has none of its adapters

    @property
    def adapters(self) -> Mapping[str, Path]:
        """The adapters that the server needs for it, by name."""
        return self.routing.bundle.adapter_paths if self.share else {}

    def answers(self, asked: Sequence[Sequence[str]], caller: Caller) -> bool:
        """Return whether it answers a request; a conversation stays where its first turn went.

        Parameters
        ----------
        asked : texts of the user turns of each conversation.
        """
        if not self.share or caller.client not in (None, *self.routing.clients):
            return False
        first = next((turns[0] for turns in asked if turns), "")
        digest = hashlib.sha256(f"{self.routing.digest} {caller.client} {first}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.share * 2**64


def load_second(settings: Settings, first: Routing) -> Second | None:
    """Load what the environment names, if it names one: as a bundle that is reloaded.

    Raises
    ------
    FedRouterError
        If it must not be served, or has another base, embedder or chat template than the first.
    """
    if settings.second is None:
        return None
    return Second(first.load_beside(settings.second), settings.canary)
