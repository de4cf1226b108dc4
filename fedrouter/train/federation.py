"""The interface between server and clients, and the constants that both sides share.

The server reaches clients only through ``Federation``; messages are the dataclasses of fedrouter/types.py.
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
FEW = "few rows"  # replaces every label that too few rows of a client have
NOISY_STEPS = 3  # steps of Lloyd's algorithm with ``privacy.centroid_noise``
DISCOVERY_RELEASES = 1 + NOISY_STEPS + 1  # the mean, each k-means step, the subsets


def num_validation(num_rows: int, share: float) -> int:
    """Return how many of a subset's rows are held out for validation; at least one is trained on."""
    return min(int(share * num_rows), num_rows - 1)


class Summaries(Protocol):
    """The part of a federation that task discovery uses."""

    def summarise(self, num: Count) -> Iterable[LocalClusters]:
        """Have every client cluster its own rows."""
        ...


class Federation(Summaries, Protocol):
    """The clients, in this process (local.py) or on other machines (server/remote.py).

    Replies are yielded one by one, in the clients' order, because thousands of them may not fit into memory.
    Methods used before the rounds ask every client and then raise ``ClientError`` if some of them failed.
    """

    def members(self) -> Sequence[Member]:
        """Have every client identify itself."""
        ...

    def reread(self) -> Sequence[Reread]:
        """Have every client read its rows again; a client that cannot keeps the rows it has."""
        ...

    def regroup(self, space: RoutingSpace, membership: Membership | None = None) -> Iterable[LocalClusters]:
        """Have every client group its rows by nearest centroid, or by ``membership``."""
        ...

    def assign(self, space: RoutingSpace, membership: Membership | None = None) -> list[Assignment]:
        """Have every client assign its rows to the nearest task clusters, or by ``membership``."""
        ...

    def compare(self, space: RoutingSpace, radii: Sequence[float]) -> Sequence[Comparison]:
        """Have every client compare its rows with task clusters that already exist."""
        ...

    def summarise_beyond(self, num: Count) -> Iterable[LocalClusters]:
        """Have clients cluster the rows that lie beyond every radius of the last ``compare``, in its space.

        Only clients whose ``Comparison.may_summarise`` is true are asked.
        """
        ...

    def leave(self, names: Collection[str]) -> None:
        """Drop these clients from the federation."""
        ...

    def train(self, requests: Sequence[TrainRequest]) -> Iterator[TrainReply | TrainFailure]:
        """Have the named clients train; yield each reply or failure as it arrives."""
        ...

    def validate(self, requests: Sequence[ValidationRequest]) -> Iterator[ValidationReply | TrainFailure]:
        """Have the named clients compute validation losses; used only with ``train.validation``."""
        ...


@dataclass(frozen=True, slots=True)
class Trained:
    """The result of one local training."""

    adapter: AdapterState
    num_examples: int  # examples that went through the model
    loss: float  # mean over the steps, nats per token
    seconds: float


class Trainer(Protocol):
    """Trains and validates adapters on tokenised rows, in this process (sft.py) or another (workers.py)."""

    @property
    def validation(self) -> float:
        """Share of a subset's rows that is held out for validation."""
        ...

    @property
    def batch_size(self) -> int:
        """Rows per optimizer step."""
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
        """Return an adapter's mean loss on ``data``, nats per completion token, and the number of tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Beyond:
    """Limits task discovery to the rows that lie beyond every radius of the last ``compare``."""

    federation: Federation

    def summarise(self, num: Count) -> Iterable[LocalClusters]:
        """Have every client with enough such rows cluster them."""
        return self.federation.summarise_beyond(num)
