"""What a client does when asked. Rows never leave this class."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedrouter.config import Count
from fedrouter.embed import routing_text
from fedrouter.errors import DataError, TrainingError
from fedrouter.train import cluster
from fedrouter.types import (
    Array,
    Assignment,
    Float64s,
    LocalClusters,
    Moments,
    Record,
    RoutingSpace,
    TrainReply,
    TrainRequest,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from fedrouter.embed import Embedder
    from fedrouter.train.sft import AdapterTrainer


class Client:
    """One participant: its records, their vectors, and the subsets they fall into."""

    def __init__(self, name: str, records: Sequence[Record], embedder: "Embedder", seed: int):
        if len(records) < 2:
            raise DataError(f"client {name}: {len(records)} row; a client needs at least two")
        self.name = name
        self._records = records
        self._tasks = [record.task for record in records]
        self._seed = seed
        self._vectors: Array = embedder.embed([routing_text(record.turns) for record in records])
        self._answers: Array = embedder.embed([record.completion for record in records])
        self._fit, self._held = cluster.set_aside(len(records), derive_seed(seed, name, "set aside"))
        self._labels: cluster.Labels | None = None
        self._subsets: dict[int, Dataset] = {}

    def summarise(self, num: Count) -> LocalClusters:
        """Cluster the client's rows; reveal centroids, counts and one scatter matrix."""
        seed = derive_seed(self._seed, self.name)
        try:
            return cluster.summarise(self._vectors[self._fit], num, seed)
        except TrainingError as error:
            raise TrainingError(f"client {self.name}: {error}") from error

    def regroup(self, space: RoutingSpace) -> LocalClusters:
        """Give each row to the nearest centroid; reveal what came together."""
        return cluster.regroup(self._vectors[self._fit], space)

    def moments(self, space: RoutingSpace, basis: Float64s) -> Moments:
        """Reveal moments of the rows set aside, and the mean answers."""
        return cluster.moments(self._vectors, self._answers, self._held, space, basis)

    def assign(self, space: RoutingSpace) -> Assignment:
        """Take the task clusters on; reveal how many rows fall on each, and how far they lie."""
        self._labels, subsets = cluster.assign(self._vectors, self._held, space, self._tasks)
        self._subsets.clear()
        return Assignment(self.name, subsets)

    def train(self, request: TrainRequest, trainer: "AdapterTrainer") -> TrainReply:
        """Train the adapter that came with ``request`` on the rows of its task cluster."""
        if self._labels is None:
            raise TrainingError(f"client {self.name}: asked to train before its rows were assigned")
        if request.cluster not in self._subsets:
            rows = [self._records[i] for i in np.flatnonzero(self._labels == request.cluster)]
            self._subsets[request.cluster] = trainer.tokenise(rows)
        seed = derive_seed(self._seed, self.name, request.cluster, request.round)
        trained = trainer.train(
            request.adapter, self._subsets[request.cluster], request.steps, request.learning_rate, seed
        )
        return TrainReply(
            self.name, request.cluster, trained.adapter, trained.num_examples, trained.loss, trained.seconds
        )


def derive_seed(seed: int, *parts: object) -> int:
    """Return a 31-bit seed of its own for each client, task cluster and round, the same on every machine."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
