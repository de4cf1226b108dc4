"""Federation in one process: every client shares one base model in memory, adapters are swapped in."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from fedrouter.config import Count
from fedrouter.train.client import Client, failure
from fedrouter.train.memory import out_of_memory
from fedrouter.types import (
    Assignment,
    Float64s,
    LocalClusters,
    Membership,
    Moments,
    RoutingSpace,
    TrainFailure,
    TrainReply,
    TrainRequest,
    ValidationReply,
    ValidationRequest,
)

if TYPE_CHECKING:
    from fedrouter.train.sft import AdapterTrainer

Request = TypeVar("Request", TrainRequest, ValidationRequest)
Reply = TypeVar("Reply")


class LocalFederation:
    """Clients in this process, one after the other."""

    def __init__(self, clients: Sequence[Client], trainer: "AdapterTrainer"):
        self.replace(clients)
        self._trainer = trainer

    def replace(self, clients: Sequence[Client]) -> None:
        """Go on with these clients: the same ones with other rows, say."""
        self._clients = {client.name: client for client in clients}

    def summarise(self, num: Count) -> Iterator[LocalClusters]:
        """Have every client cluster its own rows, unless it has set all of them aside."""
        return (client.summarise(num) for client in self._clients.values() if client.may_summarise)

    def regroup(self, space: RoutingSpace, told: Membership | None = None) -> Iterator[LocalClusters]:
        """Have every client give its rows to the nearest centroid, or where it is told."""
        return (client.regroup(space, told) for client in self._clients.values())

    def moments(self, space: RoutingSpace, basis: Float64s) -> Iterator[Moments]:
        """Have every client reveal moments of its set-aside rows."""
        return (client.moments(space, basis) for client in self._clients.values())

    def assign(self, space: RoutingSpace, told: Membership | None = None) -> list[Assignment]:
        """Tell every client the task clusters."""
        return [client.assign(space, told) for client in self._clients.values()]

    def train(self, requests: Sequence[TrainRequest]) -> Iterator[TrainReply | TrainFailure]:
        """Train each request in turn; a client's failure is an answer, running out of memory is not."""
        for request in requests:
            yield self._ask(self._clients[request.client].train, request)

    def validate(self, requests: Sequence[ValidationRequest]) -> Iterator[ValidationReply | TrainFailure]:
        """Have each request's client judge an adapter."""
        for request in requests:
            yield self._ask(self._clients[request.client].validate, request)

    def _ask(
        self, what: Callable[[Request, "AdapterTrainer"], Reply], request: Request
    ) -> Reply | TrainFailure:
        try:
            return what(request, self._trainer)
        except Exception as error:
            if out_of_memory(error):
                raise
            return failure(request, error)
