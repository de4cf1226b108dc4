"""Federation in one process: every client shares one base model in memory, adapters are swapped in."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from fedrouter.config import Count
from fedrouter.errors import ClientError, FedRouterError
from fedrouter.train.client import Client, failure, reason_of
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
Told = TypeVar("Told")


def each(clients: Iterable[str], what: Callable[[str], Told]) -> Iterator[Told]:
    """Yield what each client tells.

    Raises
    ------
    ClientError
        At the end, if some could not. What settings or data files are to blame for is raised as it is, and so
        is running out of memory.
    """
    failed = {}
    for client in clients:
        try:
            told = what(client)
        except FedRouterError:
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            failed[client] = reason_of(client, error)
        else:
            yield told
    if failed:
        raise ClientError(failed)


class LocalFederation:
    """Clients in this process, one after the other."""

    def __init__(self, clients: Sequence[Client], trainer: "AdapterTrainer"):
        self.clients = {client.name: client for client in clients}
        self._trainer = trainer

    def summarise(self, num: Count) -> Iterator[LocalClusters]:
        """Have every client cluster its own rows, unless it has set all of them aside."""
        telling = [name for name, client in self.clients.items() if client.may_summarise]
        return each(telling, lambda name: self.clients[name].summarise(num))

    def regroup(self, space: RoutingSpace, told: Membership | None = None) -> Iterator[LocalClusters]:
        """Have every client give its rows to the nearest centroid, or where it is told."""
        return each(self.clients, lambda name: self.clients[name].regroup(space, told))

    def moments(self, space: RoutingSpace, basis: Float64s) -> Iterator[Moments]:
        """Have every client reveal moments of its set-aside rows."""
        return each(self.clients, lambda name: self.clients[name].moments(space, basis))

    def assign(self, space: RoutingSpace, told: Membership | None = None) -> list[Assignment]:
        """Tell every client the task clusters."""
        return list(each(self.clients, lambda name: self.clients[name].assign(space, told)))

    def leave(self, names: Collection[str]) -> None:
        """Go on without these clients."""
        for name in names:
            del self.clients[name]

    def train(self, requests: Sequence[TrainRequest]) -> Iterator[TrainReply | TrainFailure]:
        """Train each request in turn; a client's failure is an answer, running out of memory is not."""
        for request in requests:
            yield self._ask(self.clients[request.client].train, request)

    def validate(self, requests: Sequence[ValidationRequest]) -> Iterator[ValidationReply | TrainFailure]:
        """Have each request's client judge an adapter."""
        for request in requests:
            yield self._ask(self.clients[request.client].validate, request)

    def _ask(
        self, what: Callable[[Request, "AdapterTrainer"], Reply], request: Request
    ) -> Reply | TrainFailure:
        try:
            return what(request, self._trainer)
        except Exception as error:
            if out_of_memory(error):
                raise
            return failure(request, error)
