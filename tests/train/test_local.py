"""Distribution of requests over several trainers."""

import threading
import time
from collections.abc import Sequence

import pytest

from fedrouter.errors import WorkerError
from fedrouter.train.local import LocalFederation
from fedrouter.types import TrainFailure, TrainReply, TrainRequest

REQUESTS = [TrainRequest(f"client-{n}", n % 3, 0, {}, 1, 1e-3) for n in range(12)]


class Asked:
    """A client that trains through the trainer's ``work``."""

    def __init__(self, name: str):
        self.name = name

    def train(self, request: TrainRequest, trainer: "Busy") -> TrainReply:
        return trainer.work(request)


class Busy:
    """A slow trainer that records its requests; ``error`` is raised on its second request."""

    def __init__(self, name: str, error: Exception | None = None):
        self.name, self.error, self.requests = name, error, list[TrainRequest]()
        self.threads = set[int]()

    def work(self, request: TrainRequest) -> TrainReply:
        self.requests.append(request)
        self.threads.add(threading.get_ident())
        time.sleep(0.005)
        if self.error and len(self.requests) == 2:
            raise self.error
        return TrainReply(request.client, request.cluster, {}, 8, 1.0, 0.0)


def answers(here: Busy, workers: Sequence[Busy]) -> list[TrainReply | TrainFailure]:
    clients = [Asked(request.client) for request in REQUESTS]
    federation = LocalFederation(clients, here, workers)  # type: ignore[arg-type]
    return list(federation.train(REQUESTS))


def test_every_request_is_answered_exactly_once() -> None:
    here, workers = Busy("here"), [Busy("one"), Busy("two")]
    found = answers(here, workers)
    assert sorted(a.client for a in found) == sorted(r.client for r in REQUESTS)
    assert sum(len(t.requests) for t in (here, *workers)) == len(REQUESTS)
    assert all(len(t.requests) >= 2 and len(t.threads) == 1 for t in (here, *workers))
    assert here.threads == {threading.get_ident()}, "the main thread trains, so that Ctrl-C stops it"


def test_a_failure_in_a_worker_fails_one_request() -> None:
    found = answers(Busy("here"), [Busy("one", ValueError("shapes"))])
    failed = [a for a in found if isinstance(a, TrainFailure)]
    assert len(found) == len(REQUESTS)
    assert [a.reason.partition(" ")[0] for a in failed] == ["ValueError"]


@pytest.mark.parametrize("error", [WorkerError("it is gone"), MemoryError()])
@pytest.mark.parametrize("at_worker", [True, False])
def test_no_request_starts_after_a_fatal_error(error: Exception, at_worker: bool) -> None:
    failing, other = Busy("failing", error), Busy("other")
    with pytest.raises(type(error)):
        answers(*((other, [failing]) if at_worker else (failing, [other])))
    time.sleep(0.03)
    assert len(failing.requests) == 2
    assert len(failing.requests + other.requests) < len(REQUESTS)
