"""A bundle in use: from a prompt's text to a decision, off the event loop. No HTTP."""

import asyncio
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from fedrouter.bundle import Bundle, check_base, check_embedder, load_bundle
from fedrouter.embed import Embedder, load_embedder
from fedrouter.errors import ServingError
from fedrouter.models import resolve_base
from fedrouter.route import BASE_NAME, Router
from fedrouter.serve.batch import Batcher
from fedrouter.types import Decision, TaskCluster

NO_TEXT = Decision(
    model=BASE_NAME, cluster="", distance=math.inf, radius=0.0, margin=0.0, fallback=True, distances={}
)
"""What is decided where there is no text to route by, an image alone, say; ``model`` is the fallback's."""


class Routing:
    """One bundle with its router, its embedder and the thread they run in.

    Parameters
    ----------
    decode : token ids of the base model → text.
    fallback : instead of the bundle's.
    """

    def __init__(
        self,
        bundle: Bundle,
        embedder: Embedder,
        decode: Callable[[Sequence[int]], str],
        fallback: str | None = None,
    ):
        self.bundle = bundle
        self.decode = decode
        self.clients = frozenset(client for cluster in bundle.clusters for client in cluster.clients)
        self.fallback = fallback or bundle.fallback
        router = Router(bundle, self.fallback)
        self.no_text = replace(NO_TEXT, model=router.beyond or BASE_NAME)
        self._routers: dict[str | None, Router] = {None: router}
        self._embedder = embedder
        self.batcher = Batcher[tuple[str, str | None], Decision](self._work, start=_one_thread)
        self.digest = hashlib.sha256((bundle.path / "manifest.json").read_bytes()).hexdigest()

    def clusters(self, client: str | None) -> list[TaskCluster]:
        """Return the task clusters that hold rows of a client; all of them for None."""
        return [cluster for cluster in self.bundle.clusters if client is None or client in cluster.clients]

    async def decide(self, texts: Sequence[str], client: str | None = None) -> list[Decision]:
        """Decide for each text; a blank one falls back, to the base where the nearest would answer.

        Parameters
        ----------
        client : one of ``clients``, whose task clusters are chosen from; None for all.
        """

        async def one(text: str) -> Decision:
            return await self.batcher.submit((text, client)) if text.strip() else self.no_text

        return list(await asyncio.gather(*map(one, texts)))

    def _work(self, items: Sequence[tuple[str, str | None]]) -> list[Decision]:
        """Embed all texts together; route each among its client's task clusters."""
        vectors = self._embedder.embed([text for text, _ in items])
        for client in {client for _, client in items} - self._routers.keys():
            self._routers[client] = Router(self.bundle, self.fallback, client)
        return [
            self._routers[client].route(vector[None])[0]
            for vector, (_, client) in zip(vectors, items, strict=True)
        ]


def load_routing() -> Routing:
    """Load and check what the environment names, in each of the server's processes.

    FEDROUTER_BUNDLE is the bundle's directory; FEDROUTER_BASE the base's, when not where the bundle says;
    FEDROUTER_FALLBACK a fallback instead of the bundle's.

    Raises
    ------
    FedRouterError
        If the bundle, the base model or the embedder must not be served.
    """
    if "FEDROUTER_BUNDLE" not in os.environ:
        raise ServingError("FEDROUTER_BUNDLE is not set: start the server with `fedrouter serve BUNDLE`")
    bundle = load_bundle(Path(os.environ["FEDROUTER_BUNDLE"]))
    base = os.environ.get("FEDROUTER_BASE")
    base_path = Path(base) if base else resolve_base(bundle.base.model, bundle.base.revision)
    check_base(bundle, base_path)
    embedder = load_embedder(bundle.embedder, bundle.base, base_path)
    check_embedder(bundle, embedder)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(base_path))
    return Routing(
        bundle,
        embedder,
        lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        os.environ.get("FEDROUTER_FALLBACK"),
    )


def _one_thread() -> None:
    """Keep the worker thread off the engine's cores: with two threads beside it, p95 grew to 400 ms."""
    import torch

    torch.set_num_threads(1)
    threadpool_limits(1)  # FAISS brings an OpenMP of its own
