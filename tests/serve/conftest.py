"""A bundle that needs no model, and a server for it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from bundles import write_word_bundle
from echo import PATIENT, Server, WordEmbedder

from fedrouter.bundle import Bundle
from fedrouter.serve.access import Access
from fedrouter.serve.decision_log import LogOptions
from fedrouter.serve.limits import Limits
from fedrouter.serve.routing import Routing


@pytest.fixture(scope="session")
def word_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_word_bundle(tmp_path_factory.mktemp("serve") / "bundle")


@pytest.fixture(scope="session")
def tenants_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Client ann has headlines, bob has summaries, and both have the third task."""
    clients = {"headline": ("ann",), "summary": ("bob",), "tâche": ("ann", "bob")}
    return write_word_bundle(tmp_path_factory.mktemp("tenants") / "bundle", clients=clients)


@pytest.fixture
def embedder() -> WordEmbedder:
    return WordEmbedder()


def serve_words(
    bundle: Bundle,
    embedder: WordEmbedder,
    app: Any = None,
    *,
    fallback: str | None = None,
    access: Access | None = None,
    log: LogOptions | None = None,
    **limits: Any,
) -> Server:
    words = ["write", "a", "headline", "for", "this", "news", "story"]
    decode = lambda ids: " ".join(words[i] for i in ids)  # noqa: E731
    return Server(
        lambda: Routing(bundle, embedder, decode, fallback, Limits(**{**PATIENT, **limits})), app, access, log
    )


@pytest.fixture
def make_server(word_bundle: Bundle, embedder: WordEmbedder) -> Callable[..., Server]:
    """Serve ``word_bundle``, with limits, a fallback or access rules."""
    return partial(serve_words, word_bundle, embedder)


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    return make_server()


@pytest.fixture
def serve(tenants_bundle: Bundle, embedder: WordEmbedder) -> Callable[..., Server]:
    """Serve ``tenants_bundle``, with limits, a fallback or access rules."""
    return partial(serve_words, tenants_bundle, embedder)


@pytest.fixture
def adapter_of(word_bundle: Bundle) -> Callable[[str], str]:
    return {cluster.name: cluster.adapter for cluster in word_bundle.clusters}.__getitem__
