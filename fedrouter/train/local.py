"""Federation on one machine: the clients share the base models in memory."""

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
Result = TypeVar("Result")


def each(clients: Iterable[str], ask: Callable[[str], Result]) -> Iterator[Result]:
    """Yield the result of ``ask`` for each client.

    Raises
    ------
    ClientError
        At the end, if clients failed. Errors in settings or data files and out-of-memory errors are raised
        at once, unchanged.
    """
    failed = {}
    for client in clients:
        try:
            result = ask(client)
        except FedRouterError:
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            failed[client] = reason_of(client, error)
        else:
            yield result
    if failed:
        raise ClientError(failed)


class LocalFederation:
    """Clients in this process. ``trainer`` and each of ``workers`` handle one request at a time."""

    def __init__(self, clients: Sequence[Client], trainer: Trainer, workers: Sequence[Trainer] = ()):
        self.clients = {client.name: client for client in clients}
        self._trainer, self._workers = trainer, workers

    def members(self) -> list[Member]:
        """Have every client identify itself."""
        return list(each(self.clients, lambda name: self.clients[name].member()))

    def reread(self) -> list[Reread]:
        """Have every client read its rows again."""
        return [self._reread(name) for name in self.clients]

    def _reread(self, name: str) -> Reread:
        try:
            for _ in each([name], lambda name: self.clients[name].reread()):
                pass
        except FedRouterError as error:  # for example, another program is writing the file
            return Reread(name, str(error))
        return Reread(name, None)

    def summarise(self, num: Count) -> Iterator[LocalClusters]:
        """Have every client cluster its own rows."""
        return each(self.clients, lambda name: self.clients[name].summarise(num))

    def regroup(self, space: RoutingSpace, membership: Membership | None = None) -> Iterator[LocalClusters]:
        """Have every client group its rows by nearest centroid, or by ``membership``."""
        return each(self.clients, lambda name: self.clients[name].regroup(space, membership))

    def assign(self, space: RoutingSpace, membership: Membership | None = None) -> list[Assignment]:
        """Have every client assign its rows to the nearest task clusters, or by ``membership``."""
        return list(each(self.clients, lambda name: self.clients[name].assign(space, membership)))

    def compare(self, space: RoutingSpace, radii: Sequence[float]) -> list[Comparison]:
        """Have every client compare its rows with task clusters that already exist."""
        return list(each(self.clients, lambda name: self.clients[name].compare(space, radii)))

    def summarise_beyond(self, num: Count) -> Iterator[LocalClusters]:
        """Have clients with enough rows beyond every radius cluster these rows."""
        beyond = {name: c.beyond for name, c in self.clients.items() if c.beyond and c.beyond.may_summarise}
        return each(beyond, lambda name: beyond[name].summarise(num))

    def leave(self, names: Collection[str]) -> None:
        """Drop these clients from the federation."""
        for name in names:
            del self.clients[name]

    def train(self, requests: Sequence[TrainRequest]) -> Iterator[TrainReply | TrainFailure]:
        """Have the named clients train; yield a client's failure, but raise out-of-memory errors."""
        return self._replies(requests, lambda r, trainer: self.clients[r.client].train(r, trainer))

    def validate(self, requests: Sequence[ValidationRequest]) -> Iterator[ValidationReply | TrainFailure]:
        """Have the named clients compute validation losses."""
        return self._replies(requests, lambda r, trainer: self.clients[r.client].validate(r, trainer))

    def _replies(
        self, requests: Sequence[Request], ask: Callable[[Request, Trainer], Reply]
    ) -> Iterator[Reply | TrainFailure]:
        """Yield replies as they arrive; each free trainer takes the next request."""
        pending = iter(requests)
        worker_replies: SimpleQueue[Reply | TrainFailure | Exception] = SimpleQueue()

        def work(worker: Trainer) -> None:
            try:
                for request in pending:
                    worker_replies.put(tried(request, worker, ask))
            except Exception as error:  # next_worker_reply raises it in the main thread
                worker_replies.put(error)

        def next_worker_reply() -> Reply | TrainFailure:
            reply = worker_replies.get()
            if isinstance(reply, Exception):
                raise reply
            return reply

        for worker in self._workers:
            Thread(target=work, args=(worker,), daemon=True).start()
        waiting = len(requests)
        try:
            for request in pending:
                yield tried(request, self._trainer, ask)
                waiting -= 1
                while not worker_replies.empty():
                    yield next_worker_reply()
                    waiting -= 1
            for _ in range(waiting):
                yield next_worker_reply()
        finally:
            for _ in pending:  # after an error, leave the workers no further request
                pass


def tried(
    request: Request, trainer: Trainer, ask: Callable[[Request, Trainer], Reply]
) -> Reply | TrainFailure:
    """Return a client's reply or its failure; raise out-of-memory and worker errors."""
    try:
        return ask(request, trainer)
    except Exception as error:
        if out_of_memory(error) or isinstance(error, WorkerError):
            raise
        return failure(request, error)
