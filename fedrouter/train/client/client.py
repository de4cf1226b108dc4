"""What a client does when asked. Rows never leave this class."""

import copy
import hashlib
import hmac
import logging
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedrouter.config import Count, PrivacySettings
from fedrouter.embed import probe, routing_text
from fedrouter.errors import DataError, TrainingError, first_line
from fedrouter.train.client import cluster, noise
from fedrouter.train.client.noise import Noise
from fedrouter.train.federation import Trainer, num_validation
from fedrouter.train.space import Labels
from fedrouter.types import (
    Array,
    Assignment,
    Comparison,
    LocalClusters,
    Member,
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

LOG = logging.getLogger("fedrouter.client")  # on the client's machine


class Client:
    """One participant: its records, their vectors, and the subsets they fall into."""

    def __init__(
        self,
        name: str,
        records: Sequence[Record],
        embedder: "Embedder",
        seed: int,
        privacy: PrivacySettings | None = None,
        secret: bytes = b"",
        read: Callable[[], Sequence[Record]] | None = None,
    ):
        self._privacy = privacy or PrivacySettings()
        self._least = self._privacy.min_cluster_size
        self._secret, self._noise = secret, Noise(secret, name)
        self._embedder, self._seed, self._read = embedder, seed, read
        self.name = name
        self._take(records)
        if self._privacy.centroid_noise:
            self._centre = probe(embedder).mean(0, dtype=np.float64)  # the same for all: no row is in it

    def _take(self, records: Sequence[Record]) -> None:
        """Embed records and hold them from now on, or raise and hold what was there."""
        if len(records) < (needed := max(2, self._least)):
            raise DataError(
                f"client {self.name}: {len(records)} rows; with privacy.min_cluster_size = {self._least} "
                f"it needs at least {needed}"
            )
        vectors: Array = self._embedder.embed([routing_text(record.turns) for record in records])
        if not np.isfinite(vectors).all():
            raise TrainingError(f"client {self.name}: embeddings are not finite; set base.dtype to float32")
        self._records, self._vectors = records, vectors
        self._tasks = [record.task for record in records]
        self._rows: dict[int, Labels] = {}  # by task cluster, once assigned
        self._subsets: dict[int, tuple[Dataset, Dataset | None]] = {}
        self.beyond: Client | None = None  # the client with its rows beyond every radius, once compared

    @property
    def num_rows(self) -> int:
        """Rows it holds."""
        return len(self._records)

    def member(self) -> Member:
        """Say who this is."""
        digest = hmac.digest(self._secret, repr((self.name, list(self._records))).encode(), "sha256")
        return Member(self.name, self.num_rows, digest.hex()[:32])

    def reread(self) -> None:
        """Read the rows again; if they have changed, go on as a client that starts with them."""
        assert self._read is not None, "whoever asks for this gives clients a way to read"
        records = self._read()
        if records != self._records:
            self._take(records)

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
        return self.num_rows >= self._least

    def summarise(self, num: Count) -> LocalClusters:
        """Cluster the client's rows; reveal centroids, counts and one scatter matrix."""
        seed = derive_seed(self._seed, self.name)
        if self._privacy.centroid_noise:
            assert num != "auto", "the configuration refuses this"
            return noise.summarise(self._vectors, self._centre, num, seed, self._privacy, self._noise)
        try:
            return cluster.summarise(self._vectors, num, seed, self._least)
        except TrainingError as error:
            raise TrainingError(f"client {self.name}: {error}") from error

    def regroup(self, space: RoutingSpace, told: Membership | None = None) -> LocalClusters:
        """Give each row to the nearest centroid, or where it is told; reveal what came together."""
        self._refuse_without_noise()
        if told is None:
            return cluster.regroup(self._vectors, space, self._least)
        rows = cluster.told_rows(self.name, self._tasks, told)
        return cluster.gather_told(self._vectors, rows, told.num, self._least)

    def assign(self, space: RoutingSpace, told: Membership | None = None) -> Assignment:
        """Take the task clusters on; reveal how many rows fall on each, and how far they lie."""
        if self._privacy.centroid_noise:
            found = noise.assign(self._vectors, space, self._privacy, self._noise)
        else:
            rows = None if told is None else cluster.told_rows(self.name, self._tasks, told)
            found = cluster.assign(self._vectors, space, self._tasks, rows, self._least)
        self._rows, subsets = found
        self._subsets.clear()
        return Assignment(self.name, subsets)

    def compare(self, space: RoutingSpace, radii: Sequence[float]) -> Comparison:
        """Compare the rows with task clusters that already exist.

        Counts of rows are revealed where they are no fewer than ``privacy.min_cluster_size``. The rows beyond
        every radius stay here, as ``beyond``, in coordinates of ``space``.
        """
        labels, outside = cluster.compare(self._vectors, space, radii)
        rest = copy.copy(self)
        rest._vectors = space.project(self._vectors[outside]).astype(np.float32)
        rest._records = [self._records[i] for i in outside]
        rest._tasks = [self._tasks[i] for i in outside]
        rest._rows, rest._subsets = {}, {}
        self.beyond = rest
        counts = zip(*(a.tolist() for a in np.unique(labels, return_counts=True)), strict=True)
        return Comparison(
            self.name,
            {k: count for k, count in counts if count >= self._least},
            rest.num_rows if rest.num_rows >= self._least else 0,
            rest.may_summarise,
        )

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
            num = num_validation(len(rows), trainer.validation)
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
    LOG.warning("client %s: %s: %s", client, type(error).__name__, first_line(error))
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}; its own log says more"


def derive_seed(seed: int, *parts: object) -> int:
    """Return a 31-bit seed of its own for each client, task cluster and round, the same on every machine."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
