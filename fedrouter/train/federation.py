"""The wire between server and clients: what is asked, what trains, and what both sides must agree on.

``Federation`` is all that the server knows of clients; messages are dataclasses of ``fedrouter/types.py``.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fedrouter.config import Count
from fedrouter.types import (
    AdapterState,
    Assignment,
    Comparison,
    LocalClusters,
    Member,
    Membership,
    Record,
    Reread,
    RoutingSpace,
    TrainFailure,
    TrainReply,
    TrainRequest,
    ValidationReply,
    ValidationRequest,
)

if TYPE_CHECKING:
    from datasets import Dataset

QUANTILES = np.linspace(0, 1, 101)
FEW = "few rows"  # stands for all labels that too few rows of a client carry
NOISY_STEPS = 3  # of Lloyd's algorithm, where what is sent before the rounds is noisy
DISCOVERY_RELEASES = 1 + NOISY_STEPS + 1  # the mean, each step, the subsets


def num_validation(num_rows: int, share: float) -> int:
    """Return how many of a subset's rows are not trained on; one row at least is."""
    return min(int(share * num_rows), num_rows - 1)


class Summaries(Protocol):
    """What finding tasks needs of a federation."""

    def summarise(self, num: Count) -> Iterable[LocalClusters]:
        """Have every client cluster its own rows."""
        ...


class Federation(Summaries, Protocol):
    """The clients, wherever they run: in this process (local.py) or on other machines.

    Replies come one by one, in the clients' order: thousands of them need not fit into memory together. What
    comes before the rounds raises ``ClientError`` once all were asked and some could not answer.
    """

    def members(self) -> Sequence[Member]:
        """Ask who is there."""
        ...

    def reread(self) -> Sequence[Reread]:
        """Have every client read its rows again; one that cannot goes on with those it has."""
        ...

    def regroup(self, space: RoutingSpace, told: Membership | None = None) -> Iterable[LocalClusters]:
        """Have every client give its rows to the nearest centroid, or where it is told."""
        ...

    def assign(self, space: RoutingSpace, told: Membership | None = None) -> list[Assignment]:
        """Tell every client the task clusters, and, in a baseline, which its rows belong to."""
        ...

    def compare(self, space: RoutingSpace, radii: Sequence[float]) -> Sequence[Comparison]:
        """Have every client compare its rows with task clusters that already exist."""
        ...

    def summarise_beyond(self, num: Count) -> Iterable[LocalClusters]:
        """Have clients cluster their rows beyond every radius of the last ``compare``, in its space.

        Only clients whose ``Comparison`` says that they may are asked.
        """
        ...

    def leave(self, names: Collection[str]) -> None:
        """Go on without these clients."""
        ...

    def train(self, requests: Sequence[TrainRequest]) -> Iterator[TrainReply | TrainFailure]:
        """Have the named clients train; yield replies as they come, or that a client could not."""
        ...

    def validate(self, requests: Sequence[ValidationRequest]) -> Iterator[ValidationReply | TrainFailure]:
        """Have the named clients judge adapters; asked for only with ``train.validation``."""
        ...


@dataclass(frozen=True, slots=True)
class Trained:
    """What one local training gave."""

    adapter: AdapterState
    num_examples: int  # examples that went through the model
    loss: float  # mean over the steps, nats a token
    seconds: float


class Trainer(Protocol):
    """Trains and judges adapters on tokenised rows: in this process (sft.py) or in another (workers.py)."""

    @property
    def validation(self) -> float:
        """Share of a subset's rows that is not trained on."""
        ...

    @property
    def batch_size(self) -> int:
        """Rows an optimizer step."""
        ...

    @property
    def trained(self) -> list[str]:
        """Names of the tensors that training changes."""
        ...

    def tokenise(self, records: Sequence[Record]) -> "Dataset":
        """Tokenise records for the base model."""
        ...

    def train(
        self, adapter: AdapterState, data: "Dataset", steps: int, learning_rate: float, seed: int
    ) -> "Trained":
        """Train ``adapter`` on ``data``."""
        ...

    def loss(self, adapter: AdapterState, data: "Dataset") -> tuple[float, int]:
        """Return an adapter's mean loss on ``data``, nats a completion token, and how many tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Beyond:
    """The clients' rows beyond every radius of the last ``compare``, as something to find tasks in."""

    federation: Federation

    def summarise(self, num: Count) -> Iterable[LocalClusters]:
        """Have every client that may cluster its rows beyond."""
        return self.federation.summarise_beyond(num)
