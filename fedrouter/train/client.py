"""What a client does when asked. Rows never leave this class."""

import copy
import hashlib
import logging
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fedrouter.config import Count, PrivacySettings
from fedrouter.embed import probe, routing_text
from fedrouter.errors import DataError, TrainingError
from fedrouter.train import cluster, noise
from fedrouter.train.noise import Noise
from fedrouter.types import (
    AdapterState,
    Array,
    Assignment,
    LocalClusters,
    Membership,
    Record,
    RoutingSpace,
    TrainFailure,
    TrainReply,
    TrainRequest,
    ValidationReply,
    ValidationRequest,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from fedrouter.embed import Embedder
    from fedrouter.train.sft import Trained

LOG = logging.getLogger("fedrouter.client")  # on the client's machine


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


class Client:
    """One participant: its records, their vectors, and the subsets they fall into."""

    def __init__(
        self,
        name: str,
        records: Sequence[Record],
        embedder: "Embedder",
        seed: int,
        privacy: PrivacySettings | None = None,
        noise_key: bytes = b"",
    ):
        self._privacy = privacy or PrivacySettings()
        self._least = self._privacy.min_cluster_size
        self._noise = Noise(noise_key, name)
        if len(records) < (needed := max(2, self._least)):
            raise DataError(
                f"client {name}: {len(records)} rows; with privacy.min_cluster_size = {self._least} "
                f"it needs at least {needed}"
            )
        self.name = name
        self._records = records
        self._tasks = [record.task for record in records]
        self._seed = seed
        self._vectors: Array = embedder.embed([routing_text(record.turns) for record in records])
        if not np.isfinite(self._vectors).all():
            raise TrainingError(f"client {name}: embeddings are not finite; set base.dtype to float32")
        if self._privacy.centroid_noise:
            self._centre = probe(embedder).mean(0, dtype=np.float64)  # the same for all: no row is in it
        self._fit, self._held = cluster.set_aside(len(records), derive_seed(seed, name, "set aside"))
        self._rows: dict[int, cluster.Labels] = {}  # by task cluster, once assigned
        self._subsets: dict[int, tuple[Dataset, Dataset | None]] = {}

    @property
    def num_rows(self) -> int:
        """Rows it holds."""
        return len(self._records)

    def placed(self) -> tuple[Array, list[str | None], list[int]]:
        """Return vectors (n, d), task labels and task clusters (-1: none) of its rows, for its own eyes."""
        clusters = [-1] * len(self._records)
        for cluster_, rows in self._rows.items():
            for row in rows:
                clusters[row] = cluster_
        return self._vectors, self._tasks, clusters

    @property
    def may_summarise(self) -> bool:
        """Whether there are rows enough to reveal a local cluster."""
        return len(self._fit) >= self._least

    def summarise(self, num: Count) -> LocalClusters:
        """Cluster the client's rows; reveal centroids, counts and one scatter matrix."""
        seed = derive_seed(self._seed, self.name)
        if self._privacy.centroid_noise:
            assert num != "auto", "the configuration refuses this"
            fit = self._vectors[self._fit]
            return noise.summarise(fit, self._centre, num, seed, self._privacy, self._noise)
        try:
            return cluster.summarise(self._vectors[self._fit], num, seed, self._least)
        except TrainingError as error:
            raise TrainingError(f"client {self.name}: {error}") from error

    def regroup(self, space: RoutingSpace, told: Membership | None = None) -> LocalClusters:
        """Give each row to the nearest centroid, or where it is told; reveal what came together."""
        self._refuse_without_noise()
        if told is None:
            return cluster.regroup(self._vectors[self._fit], space, self._least)
        rows = cluster.told_rows(self.name, self._tasks, told)
        return cluster.gather_told(self._vectors, rows, told.num, self._least)

    def assign(self, space: RoutingSpace, told: Membership | None = None) -> Assignment:
        """Take the task clusters on; reveal how many rows fall on each, and how far they lie."""
        if self._privacy.centroid_noise:
            found = noise.assign(self._vectors, self._held, space, self._privacy, self._noise)
        else:
            rows = None if told is None else cluster.told_rows(self.name, self._tasks, told)
            found = cluster.assign(self._vectors, self._held, space, self._tasks, rows, self._least)
        self._rows, subsets = found
        self._subsets.clear()
        return Assignment(self.name, subsets)

    def compare(self, space: RoutingSpace, radii: Sequence[float]) -> "tuple[Mapping[int, int], Client]":
        """Compare the rows with task clusters that stand.

        Returns
        -------
        within : how many rows lie within each task cluster's radius, where they are no fewer than
            ``privacy.min_cluster_size``; this is revealed.
        beyond : the client with its other rows alone, in coordinates of ``space``; it stays where it is.
        """
        labels, outside = cluster.compare(self._vectors, space, radii)
        rest = copy.copy(self)
        rest._fit, rest._held = (np.flatnonzero(np.isin(outside, own)) for own in (self._fit, self._held))
        rest._vectors = ((self._vectors[outside] - space.mean) @ space.transform).astype(np.float32)
        rest._records = [self._records[i] for i in outside]
        rest._tasks = [self._tasks[i] for i in outside]
        rest._rows, rest._subsets = {}, {}
        counts = zip(*(a.tolist() for a in np.unique(labels, return_counts=True)), strict=True)
        return {k: count for k, count in counts if count >= self._least}, rest

    def train(self, request: TrainRequest, trainer: Trainer) -> TrainReply:
        """Train the adapter that came with ``request`` on the rows of its task cluster."""
        if self._privacy.update_noise and not len(self._rows.get(request.cluster, ())):
            adapter = (
                request.adapter
            )  # noise alone says that there are rows; an update of length 0 keeps it so
        else:
            rows, _ = self._subset(request.cluster, trainer)
            seed = derive_seed(self._seed, self.name, request.cluster, request.round)
            trained = trainer.train(request.adapter, rows, request.steps, request.learning_rate, seed)
            adapter = trained.adapter
        if self._privacy.clip_updates is not None:
            asked = request.cluster, request.round
            adapter = noise.update(
                request.adapter, adapter, trainer.trained, self._privacy, self._noise, *asked
            )
        if self._privacy.update_noise:  # then nothing else tells of the rows
            asked_for = request.steps * trainer.batch_size
            return TrainReply(self.name, request.cluster, adapter, asked_for, None, 0.0)
        return TrainReply(
            self.name, request.cluster, adapter, trained.num_examples, trained.loss, trained.seconds
        )

    def validate(self, request: ValidationRequest, trainer: Trainer) -> ValidationReply:
        """Judge the adapter that came with ``request`` on rows of its subset that are not trained on."""
        _, rows = self._subset(request.cluster, trainer)
        loss, num_tokens = trainer.loss(request.adapter, rows) if rows else (0.0, 0)
        return ValidationReply(self.name, request.cluster, loss, num_tokens)

    def _refuse_without_noise(self) -> None:
        if self._privacy.centroid_noise:
            raise TrainingError(
                f"client {self.name}: there is no noise for what is asked; it reveals nothing"
            )

    def _subset(self, number: int, trainer: Trainer) -> "tuple[Dataset, Dataset | None]":
        """Return a task cluster's rows, tokenised: those to train on, and those to validate on, if any."""
        if not len(self._rows.get(number, ())):
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


def failure(request: TrainRequest | ValidationRequest, error: Exception) -> TrainFailure:
    """Say that a client could not do it; what the error says, which may quote rows, stays in its own log."""
    return TrainFailure(request.client, request.cluster, reason_of(request.client, error))


def reason_of(client: str, error: Exception) -> str:
    """Say where a client failed, in no word of its rows; log the rest."""
    LOG.warning("client %s: %s: %s", client, type(error).__name__, str(error).partition("\n")[0])
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}; its own log says more"


def derive_seed(seed: int, *parts: object) -> int:
    """Return a 31-bit seed of its own for each client, task cluster and round, the same on every machine."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
