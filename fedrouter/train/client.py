"""What a client does when asked. Rows never leave this class."""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedrouter.config import Count
from fedrouter.embed import routing_text
from fedrouter.errors import TrainingError
from fedrouter.train import cluster
from fedrouter.types import (
    Array,
    Assignment,
    Float64s,
    LocalClusters,
    Membership,
    Moments,
    Record,
    RoutingSpace,
    TrainReply,
    TrainRequest,
    ValidationReply,
    ValidationRequest,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from fedrouter.embed import Embedder
    from fedrouter.train.sft import AdapterTrainer


class Client:
    """One participant: its records, their vectors, and the subsets they fall into."""

    def __init__(self, name: str, records: Sequence[Record], embedder: "Embedder", seed: int):
        self.name = name
        self._records = records
        self._tasks = [record.task for record in records]
        self._seed = seed
        self._vectors: Array = embedder.embed([routing_text(record.turns) for record in records])
        self._answers: Array = embedder.embed([record.completion for record in records])
        self._fit, self._held = cluster.set_aside(len(records), derive_seed(seed, name, "set aside"))
        self._rows: dict[int, cluster.Labels] = {}  # by task cluster, once assigned
        self._subsets: dict[int, tuple[Dataset, Dataset | None]] = {}

    @property
    def num_rows(self) -> int:
        """Rows it holds."""
        return len(self._records)

    @property
    def num_fitted(self) -> int:
        """Rows that are not set aside."""
        return len(self._fit)

    def summarise(self, num: Count) -> LocalClusters:
        """Cluster the client's rows; reveal centroids, counts and one scatter matrix."""
        seed = derive_seed(self._seed, self.name)
        try:
            return cluster.summarise(self._vectors[self._fit], num, seed)
        except TrainingError as error:
            raise TrainingError(f"client {self.name}: {error}") from error

    def regroup(self, space: RoutingSpace, told: Membership | None = None) -> LocalClusters:
        """Give each row to the nearest centroid, or where it is told; reveal what came together."""
        if told is None:
            return cluster.regroup(self._vectors[self._fit], space)
        return cluster.gather(self._vectors, cluster.told_rows(self.name, self._tasks, told), told.num)

    def moments(self, space: RoutingSpace, basis: Float64s) -> Moments:
        """Reveal moments of the rows set aside, and the mean answers."""
        return cluster.moments(self._vectors, self._answers, self._held, space, basis)

    def assign(self, space: RoutingSpace, told: Membership | None = None) -> Assignment:
        """Take the task clusters on; reveal how many rows fall on each, and how far they lie."""
        rows = None if told is None else cluster.told_rows(self.name, self._tasks, told)
        self._rows, subsets = cluster.assign(self._vectors, self._held, space, self._tasks, rows)
        self._subsets.clear()
        return Assignment(self.name, subsets)

    def compare(self, space: RoutingSpace, radii: Sequence[float]) -> "tuple[Mapping[int, int], Client]":
        """Compare the rows with task clusters that stand.

        Returns
        -------
        within : how many rows lie within each task cluster's radius; this is revealed.
        beyond : the client with its other rows alone, in coordinates of ``space``; it stays where it is.
        """
        labels, outside = cluster.compare(self._vectors, space, radii)
        rest = copy.copy(self)
        rest._fit, rest._held = (np.flatnonzero(np.isin(outside, own)) for own in (self._fit, self._held))
        rest._vectors = ((self._vectors[outside] - space.mean) @ space.transform).astype(np.float32)
        rest._answers = self._answers[outside]
        rest._records = [self._records[i] for i in outside]
        rest._tasks = [self._tasks[i] for i in outside]
        rest._rows, rest._subsets = {}, {}
        return dict(zip(*(a.tolist() for a in np.unique(labels, return_counts=True)), strict=True)), rest

    def train(self, request: TrainRequest, trainer: "AdapterTrainer") -> TrainReply:
        """Train the adapter that came with ``request`` on the rows of its task cluster."""
        rows, _ = self._subset(request.cluster, trainer)
        seed = derive_seed(self._seed, self.name, request.cluster, request.round)
        trained = trainer.train(request.adapter, rows, request.steps, request.learning_rate, seed)
        return TrainReply(
            self.name, request.cluster, trained.adapter, trained.num_examples, trained.loss, trained.seconds
        )

    def validate(self, request: ValidationRequest, trainer: "AdapterTrainer") -> ValidationReply:
        """Judge the adapter that came with ``request`` on rows of its subset that are not trained on."""
        _, rows = self._subset(request.cluster, trainer)
        loss, num_tokens = trainer.loss(request.adapter, rows) if rows else (0.0, 0)
        return ValidationReply(self.name, request.cluster, loss, num_tokens)

    def _subset(self, number: int, trainer: "AdapterTrainer") -> "tuple[Dataset, Dataset | None]":
        """Return a task cluster's rows, tokenised: those to train on, and those to validate on, if any."""
        if number not in self._rows:
            raise TrainingError(f"client {self.name}: no row of it belongs to task cluster {number}")
        if number not in self._subsets:
            rows = self._rows[number]
            order = np.random.default_rng(derive_seed(self._seed, self.name, number, "validation"))
            num = cluster.num_validation(len(rows), trainer.validation)
            held = set(order.permutation(rows)[:num])
            train = trainer.tokenise([self._records[i] for i in rows if i not in held])
            judge = trainer.tokenise([self._records[i] for i in sorted(held)]) if held else None
            self._subsets[number] = train, judge
        return self._subsets[number]


def derive_seed(seed: int, *parts: object) -> int:
    """Return a 31-bit seed of its own for each client, task cluster and round, the same on every machine."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
