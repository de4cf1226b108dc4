"""Federation in one process: every client shares one base model in memory, adapters are swapped in."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fedrouter.config import Count
from fedrouter.train.client import Client
from fedrouter.types import (
    Assignment,
    Float64s,
    LocalClusters,
    Moments,
    RoutingSpace,
    TrainReply,
    TrainRequest,
)

if TYPE_CHECKING:
    from fedrouter.train.sft import AdapterTrainer


class LocalFederation:
    """Clients in this process, one after the other."""

    def __init__(self, clients: Sequence[Client], trainer: "AdapterTrainer"):
        self._clients = {client.name: client for client in clients}
        self._trainer = trainer

    def summarise(self, num: Count) -> list[LocalClusters]:
        """Have every client cluster its own rows."""
        return [client.summarise(num) for client in self._clients.values()]

    def regroup(self, space: RoutingSpace) -> list[LocalClusters]:
        """Have every client give its rows to the nearest centroid."""
        return [client.regroup(space) for client in self._clients.values()]

    def moments(self, space: RoutingSpace, basis: Float64s) -> list[Moments]:
        """Have every client reveal moments of its set-aside rows."""
        return [client.moments(space, basis) for client in self._clients.values()]

    def assign(self, space: RoutingSpace) -> list[Assignment]:
        """Tell every client the task clusters."""
        return [client.assign(space) for client in self._clients.values()]

    def train(self, requests: Sequence[TrainRequest]) -> Iterator[TrainReply]:
        """Train each request in turn."""
        for request in requests:
            yield self._clients[request.client].train(request, self._trainer)
