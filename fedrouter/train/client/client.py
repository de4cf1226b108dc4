"""A client and its replies to the server's requests. Rows never leave this class."""

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
from fedrouter.errors import TrainingError, first_line
from fedrouter.layout import number_of
from fedrouter.train.client import cluster, noise
from fedrouter.train.client.noise import Noise
from fedrouter.train.client.sources import check_size
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

LOG = logging.getLogger("fedrouter.client")  # stays on the client's machine


class Client:
    """One participant: its records, their vectors, and their subsets by task cluster."""

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
        self._min_rows = self._privacy.min_cluster_size
        self._secret, self._noise = secret, Noise(secret, name)
        self._embedder, self._seed, self._read = embedder, seed, read
        self.name = name
        self._set_records(records)
        if self._privacy.centroid_noise:
            self._clip_centre = probe(embedder).mean(0, dtype=np.float64)  # equal for all, from no row

    def _set_records(self, records: Sequence[Record]) -> None:
        """Embed ``records`` and replace the current ones; after an error the current ones stay."""
        check_size(self.name, len(records), self._min_rows, f"{number_of(len(records), 'row')} in its data")
        vectors: Array = self._embedder.embed([routing_text(record.turns) for record in records])
        if not np.isfinite(vectors).all():
            raise TrainingError(f"client {self.name}: embeddings are not finite; set base.dtype to float32")
        self._records, self._vectors = records, vectors
        self._tasks = [record.task for record in records]
        self._rows: dict[int, Labels] = {}  # row numbers by task cluster, set by ``assign``
        self._subsets: dict[int, tuple[Dataset, Dataset | None]] = {}
        self.beyond: Client | None = (
            None  # a client with only the rows beyond every radius, set by ``compare``
        )

    @property
    def num_rows(self) -> int:
        """Number of the client's rows."""
        return len(self._records)

    def member(self) -> Member:
        """Return the client's name, its number of rows and a keyed digest of them."""
        digest = hmac.digest(self._secret, repr((self.name, list(self._records))).encode(), "sha256")
        return Member(self.name, self.num_rows, digest.hex()[:32])

    def reread(self) -> None:
        """Read the rows again; if they have changed, reset the client to the new rows."""
        assert self._read is not None, "clients that are asked to reread have a reader"
        records = self._read()
        if records != self._records:
            self._set_records(records)

    def placed(self) -> tuple[Array, list[str | None], list[int]]:
        """Return the rows' vectors (n, d), task labels and task clusters (-1: none), for local use only.

        A row that also trains FedDPA's global adapter is in its client's task cluster.
        """
        clusters = [-1] * len(self._records)
        for cluster_, rows in reversed(self._rows.items()):
            for row in rows:
                clusters[row] = cluster_
        return self._vectors, self._tasks, clusters

    @property
    def may_summarise(self) -> bool:
        """Whether the client has enough rows to reveal a local cluster."""
        return self.num_rows >= self._min_rows

    def summarise(self, num: Count) -> LocalClusters:
        """Cluster the client's rows; reveal centroids, counts and one scatter matrix."""
        seed = derive_seed(self._seed, self.name)
        if self._privacy.centroid_noise:
            assert num != "auto", "the configuration refuses this"
            return noise.summarise(self._vectors, self._clip_centre, num, seed, self._privacy, self._noise)
        try:
            return cluster.summarise(self._vectors, num, seed, self._min_rows)
        except TrainingError as error:
            raise TrainingError(f"client {self.name}: {error}") from error

    def regroup(self, space: RoutingSpace, membership: Membership | None = None) -> LocalClusters:
        """Group rows by nearest centroid or by ``membership``; reveal counts, centroids and scatter."""
        self._refuse_if_noisy()
        if membership is None:
            return cluster.regroup(self._vectors, space, self._min_rows)
        rows = cluster.rows_by_membership(self.name, self._tasks, membership)
        return cluster.gather_members(self._vectors, rows, membership.num, self._min_rows)

    def assign(self, space: RoutingSpace, membership: Membership | None = None) -> Assignment:
        """Assign rows to task clusters; reveal the number of rows and the distances in each."""
        if self._privacy.centroid_noise:
            found = noise.assign(self._vectors, space, self._privacy, self._noise)
        else:
            rows = None
            if membership is not None:
                rows = cluster.rows_by_membership(self.name, self._tasks, membership)
            found = cluster.assign(self._vectors, space, self._tasks, rows, self._min_rows)
        self._rows, subsets = found
        self._subsets.clear()
        return Assignment(self.name, subsets)

    def compare(self, space: RoutingSpace, radii: Sequence[float]) -> Comparison:
        """Compare the rows with existing task clusters.

        Only counts of at least ``privacy.min_cluster_size`` rows are revealed. The rows beyond every radius
        stay in ``self.beyond``, in coordinates of ``space``.
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
            {k: count for k, count in counts if count >= self._min_rows},
            rest.num_rows if rest.num_rows >= self._min_rows else 0,
            rest.may_summarise,
        )

    def train(self, request: TrainRequest, trainer: Trainer) -> TrainReply:
        """Train the adapter that came with ``request`` on the rows of its task cluster."""
        if self._privacy.update_noise and not len(self._rows.get(request.cluster, ())):
            # Noisy counts may claim rows that do not exist; an update of zero plus noise does not show it.
            adapter = request.adapter
        else:
            rows, _ = self._subset(request.cluster, trainer)
            seed = derive_seed(self._seed, self.name, request.cluster, request.round)
            trained = trainer.train(request.adapter, rows, request.steps, request.learning_rate, seed)
            adapter = trained.adapter
        if self._privacy.clip_updates is not None:
            release = request.cluster, request.round
            adapter = noise.update(
                request.adapter, adapter, trainer.trained, self._privacy, self._noise, *release
            )
        if self._privacy.update_noise:  # reveal nothing else about the rows
            num_requested = request.steps * trainer.batch_size
            return TrainReply(self.name, request.cluster, adapter, num_requested, None, 0.0)
        return TrainReply(
            self.name, request.cluster, adapter, trained.num_examples, trained.loss, trained.seconds
        )

    def validate(self, request: ValidationRequest, trainer: Trainer) -> ValidationReply:
        """Return the loss of the adapter that came with ``request`` on the subset's validation rows."""
        _, rows = self._subset(request.cluster, trainer)
        loss, num_tokens = trainer.loss(request.adapter, rows) if rows else (0.0, 0)
        return ValidationReply(self.name, request.cluster, loss, num_tokens)

    def _refuse_if_noisy(self) -> None:
        if self._privacy.centroid_noise:
            raise TrainingError(
                f"client {self.name}: no noise is defined for this request, so it reveals nothing"
            )

    def _subset(self, number: int, trainer: Trainer) -> "tuple[Dataset, Dataset | None]":
        """Return a task cluster's rows, tokenised: the training rows, and the validation rows, if any."""
        if not len(self._rows.get(number, ())):
            raise TrainingError(f"client {self.name}: none of its rows belongs to task cluster {number}")
        if number not in self._subsets:
            rows = self._rows[number]
            order = np.random.default_rng(derive_seed(self._seed, self.name, number, "validation"))
            num = num_validation(len(rows), trainer.validation)
            held_out = set(order.permutation(rows)[:num])
            training = trainer.tokenise([self._records[i] for i in rows if i not in held_out])
            validation = trainer.tokenise([self._records[i] for i in sorted(held_out)]) if held_out else None
            self._subsets[number] = training, validation
        return self._subsets[number]


def failure(request: TrainRequest | ValidationRequest, error: Exception) -> TrainFailure:
    """Return a failure reply; the error's text, which may quote rows, goes only to the client's log."""
    return TrainFailure(request.client, request.cluster, reason_of(request.client, error))


def reason_of(client: str, error: Exception) -> str:
    """Return the type and place of a client's error without quoting its rows; log the error's text."""
    LOG.warning("client %s: %s: %s", client, type(error).__name__, first_line(error))
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}; its own log says more"


def derive_seed(seed: int, *parts: object) -> int:
    """Return a 31-bit seed that depends on ``parts`` and is the same on every machine."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
