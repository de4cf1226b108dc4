"""Federation on one machine: clients share the base models in memory, adapters are swapped in."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

from fedrouter.config import Count
from fedrouter.errors import ClientError, FedRouterError, WorkerError
from fedrouter.train.client.client import Client, failure, reason_of
from fedrouter.train.federation import Trainer
from fedrouter.train.memory import out_of_memory
from fedrouter.types import (
    Assignment,
    Comparison,
    LocalClusters,
    Member,
    Membership,
    Reread,
    RoutingSpace,
    TrainFailure,
    TrainReply,
    TrainRequest,
    ValidationReply,
    ValidationRequest,
)

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
    """Clients in this process. ``workers`` train beside ``trainer``, each a request at a time."""

    def __init__(self, clients: Sequence[Client], trainer: Trainer, workers: Sequence[Trainer] = ()):
        self.clients = {client.name: client for client in clients}
        self._trainer, self._workers = trainer, workers

    def members(self) -> list[Member]:
        """Ask who is there."""
        return list(each(self.clients, lambda name: self.clients[name].member()))

    def reread(self) -> list[Reread]:
        """Have every client read its rows again."""
        return [self._reread(name) for name in self.clients]

    def _reread(self, name: str) -> Reread:
        try:
            for _ in each([name], lambda name: self.clients[name].reread()):
                pass
        except FedRouterError as error:  # its file is being written, say
            return Reread(name, str(error))
        return Reread(name, None)

    def summarise(self, num: Count) -> Iterator[LocalClusters]:
        """Have every client cluster its own rows."""
        return each(self.clients, lambda name: self.clients[name].summarise(num))

    def regroup(self, space: RoutingSpace, told: Membership | None = None) -> Iterator[LocalClusters]:
        """Have every client give its rows to the nearest centroid, or where it is told."""
        return each(self.clients, lambda name: self.clients[name].regroup(space, told))

    def assign(self, space: RoutingSpace, told: Membership | None = None) -> list[Assignment]:
        """Tell every client the task clusters."""
        return list(each(self.clients, lambda name: self.clients[name].assign(space, told)))

    def compare(self, space: RoutingSpace, radii: Sequence[float]) -> list[Comparison]:
        """Have every client compare its rows with task clusters that already exist."""
        return list(each(self.clients, lambda name: self.clients[name].compare(space, radii)))

    def summarise_beyond(self, num: Count) -> Iterator[LocalClusters]:
        """Have clients cluster their rows beyond every radius, where these are enough."""
        beyond = {name: c.beyond for name, c in self.clients.items() if c.beyond and c.beyond.may_summarise}
        return each(beyond, lambda name: beyond[name].summarise(num))

    def leave(self, names: Collection[str]) -> None:
        """Go on without these clients."""
        for name in names:
            del self.clients[name]

    def train(self, requests: Sequence[TrainRequest]) -> Iterator[TrainReply | TrainFailure]:
        """Train what is requested; a client's failure is an answer, running out of memory is not."""
        return self._answers(requests, lambda r, trainer: self.clients[r.client].train(r, trainer))

    def validate(self, requests: Sequence[ValidationRequest]) -> Iterator[ValidationReply | TrainFailure]:
        """Have each request's client judge an adapter."""
        return self._answers(requests, lambda r, trainer: self.clients[r.client].validate(r, trainer))

    def _answers(
        self, requests: Sequence[Request], ask: Callable[[Request, Trainer], Reply]
    ) -> Iterator[Reply | TrainFailure]:
        """Yield answers as they come; who is free takes the next request."""
        left = iter(requests)
        elsewhere: SimpleQueue[Reply | TrainFailure | Exception] = SimpleQueue()

        def work(worker: Trainer) -> None:
            try:
                for request in left:
                    elsewhere.put(tried(request, worker, ask))
            except Exception as error:  # raised again below
                elsewhere.put(error)

        def taken() -> Reply | TrainFailure:
            answer = elsewhere.get()
            if isinstance(answer, Exception):
                raise answer
            return answer

        for worker in self._workers:
            Thread(target=work, args=(worker,), daemon=True).start()
        waiting = len(requests)
        try:
            for request in left:
                yield tried(request, self._trainer, ask)
                waiting -= 1
                while not elsewhere.empty():
                    yield taken()
                    waiting -= 1
            for _ in range(waiting):
                yield taken()
        finally:
            for _ in left:  # after an error nothing more is begun
                pass


def tried(
    request: Request, trainer: Trainer, ask: Callable[[Request, Trainer], Reply]
) -> Reply | TrainFailure:
    """Return a client's reply, or that it failed; running out of memory is no client's failure."""
    try:
        return ask(request, trainer)
    except Exception as error:
        if out_of_memory(error) or isinstance(error, WorkerError):
            raise
        return failure(request, error)
