"""A second bundle beside the served one: it routes every request too, and may answer a share of them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedrouter.serve.access import Caller
from fedrouter.serve.routing import Routing
from fedrouter.serve.settings import Settings


@dataclass(frozen=True, slots=True)
class Second:
    """The second bundle in use."""

    routing: Routing
    share: float  # of requests that it answers, 0 to 1; at 0 the server holds none of its adapters

    @property
    def adapters(self) -> Mapping[str, Path]:
        """Adapters that the server must hold for this bundle, by name."""
        return self.routing.bundle.adapter_paths if self.share else {}

    def answers(self, user_turns: Sequence[Sequence[str]], caller: Caller) -> bool:
        """Return whether this bundle answers a request; follow-ups go where the first turn went.

        Parameters
        ----------
        user_turns : for each conversation, the texts of its user turns.
        """
        if not self.share or caller.client not in (None, *self.routing.clients):
            return False
        first = next((turns[0] for turns in user_turns if turns), "")
        digest = hashlib.sha256(f"{self.routing.digest} {caller.client} {first}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.share * 2**64


def load_second(settings: Settings, first: Routing) -> Second | None:
    """Load the second bundle, if the settings name one.

    Raises
    ------
    FedRouterError
        If it must not be served, or its base, embedder or chat template differs from the first bundle's.
    """
    if settings.second is None:
        return None
    return Second(first.load_beside(settings.second), settings.canary)
