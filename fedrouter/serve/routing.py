"""A bundle in use: from a prompt's text to a routing decision, off the event loop. No HTTP."""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from fedrouter.bundle import (
    Bundle,
    check_base,
    check_embedder,
    find_base,
    find_embedder,
    flat_map,
    load_bundle,
)
from fedrouter.decide import NO_TEXT, without_text
from fedrouter.embed import Embedder
from fedrouter.embed_endpoint import EndpointEmbedder
from fedrouter.errors import EndpointError
from fedrouter.route import Router
from fedrouter.serve.batch import Batcher, Overloaded
from fedrouter.serve.checks import check_alike
from fedrouter.serve.limits import Limits
from fedrouter.serve.settings import Settings
from fedrouter.types import Array, Decision, TaskCluster

OVERLOAD = replace(NO_TEXT)
"""The decision under overload; compare by identity, as it equals ``NO_TEXT``."""
LOCAL_BATCH = 8  # texts; a larger batch is no cheaper per text, and all wait for its end
REMOTE_BATCH = 32  # texts in one request to an embeddings endpoint
logger = logging.getLogger("vllm.fedrouter")


class Routing:
    """One bundle with its router, its embedder and the thread that they run in.

    Parameters
    ----------
    decode : token ids of the base model → text.
    fallback : overrides the fallback of this bundle and of bundles that replace it.
    base_path : the base model's directory, which new bundles are checked against; None: no check.
    signed_by : public key that must have signed new bundles; None: they need no signature.
    """

    def __init__(
        self,
        bundle: Bundle,
        embedder: Embedder,
        decode: Callable[[Sequence[int]], str],
        fallback: str | None = None,
        limits: Limits | None = None,
        base_path: Path | None = None,
        signed_by: Path | None = None,
    ):
        self.bundle, self.embedder, self.base_path = bundle, embedder, base_path
        self.signed_by = signed_by
        self.decode = decode
        self.limits = limits or Limits()
        self._fallback_override = fallback
        self.clients = frozenset(client for cluster in bundle.clusters for client in cluster.clients)
        self.fallback = fallback or bundle.fallback
        router = Router(bundle, self.fallback)
        self.no_text = without_text(router)
        self._routers: dict[str | None, Router] = {None: router}
        self._batcher = Batcher[tuple[str, str | None], tuple[Decision, Array]](
            self._work,
            REMOTE_BATCH if isinstance(embedder, EndpointEmbedder) else LOCAL_BATCH,
            start=_one_thread,
            max_queue=self.limits.max_queue,
            timeout_s=self.limits.routing_timeout_s,
        )
        self.digest = hashlib.sha256((bundle.path / "manifest.json").read_bytes()).hexdigest()
        self.embedder_digest = bundle.embedder.digest
        flat = bundle.space.map
        self.map = flat_map(bundle.space.centroids) if flat is None else flat  # (m, 2)
        self._onto_map = bundle.space.transform @ self.map
        self._last_problem = ""  # last error of the embeddings endpoint, logged once
        self._num_users = 0
        self._unused = asyncio.Event()

    def like(self, bundle: Bundle) -> "Routing":
        """Return a routing of another bundle with this one's embedder, limits and fallback override.

        Raises
        ------
        ConfigError
            If the bundle cannot have that fallback.
        """
        return Routing(
            bundle,
            self.embedder,
            self.decode,
            self._fallback_override,
            self.limits,
            self.base_path,
            self.signed_by,
        )

    def load_beside(self, path: Path) -> "Routing":
        """Load a bundle that is to replace this one, or to be served beside it.

        Raises
        ------
        FedRouterError
            If it must not be served, or differs in anything that cannot change while a server runs.
        """
        bundle = load_bundle(path, self.signed_by)
        check_alike(self.bundle, bundle)
        if self.base_path is not None:
            check_base(bundle, self.base_path)
        check_embedder(bundle, self.embedder)
        return self.like(bundle)

    @contextmanager
    def in_use(self) -> Iterator["Routing"]:
        """Keep the bundle's adapters loaded while a request is routed and answered."""
        self._num_users += 1
        try:
            yield self
        finally:
            self._num_users -= 1
            if not self._num_users:
                self._unused.set()

    async def drained(self, timeout_s: float) -> bool:
        """Wait until no request uses this bundle any more; return False after ``timeout_s``."""
        if self._num_users:
            self._unused.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._unused.wait(), timeout_s)
        return not self._num_users

    def close(self) -> None:
        """End the worker thread."""
        self._batcher.close()

    def clusters(self, client: str | None) -> list[TaskCluster]:
        """Return the task clusters that a client has rows in; all task clusters for None."""
        return [cluster for cluster in self.bundle.clusters if client is None or client in cluster.clients]

    async def route(
        self,
        texts: Sequence[str],
        client: str | None = None,
        tenant: str | None = None,
        vectors: dict[str, Array] | None = None,
    ) -> list[Decision]:
        """Route each text; blank texts fall back, to the base if the fallback is the nearest adapter.

        Parameters
        ----------
        client : one of ``clients``: route among its task clusters only; None: among all.
        tenant : tenant whose share of the queue the texts use; None: no tenant.
        vectors : text → embedding, from this embedder; missing ones are added.

        Raises
        ------
        Overloaded
            If the queue is full, the wait is too long, or the embeddings endpoint fails.
        """
        vectors = {} if vectors is None else vectors
        known = [text for text in dict.fromkeys(texts) if text in vectors]
        items = [(text, client) for text in texts if text.strip() and text not in vectors]
        try:
            results = await self._batcher.submit_all(items, tenant)
        except EndpointError as error:
            if str(error) != self._last_problem:
                logger.warning("nothing can be routed for now: %s", error)
            self._last_problem = str(error)
            raise Overloaded from error
        self._last_problem = "" if items else self._last_problem
        decisions: dict[str, Decision] = {}
        if known:
            decisions |= zip(
                known, self._router(client).route(np.stack([vectors[t] for t in known])), strict=True
            )
        for (text, _), (decision, vector) in zip(items, results, strict=True):
            decisions[text], vectors[text] = decision, vector
        return [decisions[text] if text.strip() else self.no_text for text in texts]

    async def route_now(self, texts: Sequence[str]) -> list[Decision]:
        """Route each text among all task clusters, ahead of the queue: for the hook's own checks.

        Raises
        ------
        EndpointError
            If the embeddings endpoint fails.
        """
        items = [(text, None) for text in texts if text.strip()]
        results: list[tuple[Decision, Array]] = []
        for start in range(0, len(items), LOCAL_BATCH):
            results += await self._batcher.run_now(items[start : start + LOCAL_BATCH])
        decisions = iter(decision for decision, _ in results)
        return [next(decisions) if text.strip() else self.no_text for text in texts]

    def centroids_at(self, cluster: TaskCluster) -> list[tuple[float, float]]:
        """Return the positions of a task cluster's centroids on the map."""
        number = self.bundle.clusters.index(cluster)
        rows = [row for row, k in enumerate(self.bundle.space.cluster_of) if k == number]
        return [(float(x), float(y)) for x, y in self.bundle.space.centroids[rows] @ self.map]

    def place(self, vector: Array) -> tuple[float, float]:
        """Return the position of an embedding on the map."""
        x, y = (vector - self.bundle.space.mean) @ self._onto_map
        return float(x), float(y)

    def _router(self, client: str | None) -> Router:
        if client not in self._routers:
            self._routers[client] = Router(self.bundle, self.fallback, client)
        return self._routers[client]

    def _work(self, items: Sequence[tuple[str, str | None]]) -> list[tuple[Decision, Array]]:
        """Embed all texts in one batch; route each among its client's task clusters."""
        vectors = self.embedder.embed([text for text, _ in items])
        rows: dict[str | None, list[int]] = {}
        for row, (_, client) in enumerate(items):
            rows.setdefault(client, []).append(row)
        decisions: dict[int, Decision] = {}
        for client, numbers in rows.items():
            decisions |= zip(numbers, self._router(client).route(vectors[numbers]), strict=True)
        return [(decisions[row], vectors[row]) for row in range(len(items))]


def load_routing(settings: Settings) -> Routing:
    """Load the bundle, its base's tokenizer and its embedder, and check that they fit together.

    Raises
    ------
    FedRouterError
        If the bundle, the base model or the embedder must not be served.
    """
    bundle = load_bundle(settings.bundle, settings.signed_by)
    base_path = find_base(bundle, settings.base)
    embedder = find_embedder(bundle, base_path, settings.embedder_url)
    if isinstance(embedder, EndpointEmbedder):  # half, so that it fails before requests time out
        embedder.hurry(settings.limits.routing_timeout_s / 2)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(base_path))
    return Routing(
        bundle,
        embedder,
        lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        settings.fallback,
        settings.limits,
        base_path,
        settings.signed_by,
    )


def _one_thread() -> None:
    """Leave the engine its cores: with two embedding threads, p95 latency rose to 400 ms."""
    import torch

    torch.set_num_threads(1)
    threadpool_limits(1)  # FAISS has an OpenMP of its own
