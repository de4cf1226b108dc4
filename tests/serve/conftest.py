"""A bundle without a model, and a server around it."""

from collections.abc import Callable
from typing import Any

import pytest
from bundles import write_word_bundle
from echo import PATIENT, Server, WordEmbedder

from fedrouter.bundle import Bundle
from fedrouter.serve.limits import Limits
from fedrouter.serve.routing import Routing


@pytest.fixture(scope="session")
def word_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_word_bundle(tmp_path_factory.mktemp("serve") / "bundle")


@pytest.fixture
def embedder() -> WordEmbedder:
    return WordEmbedder()


@pytest.fixture
def make_server(word_bundle: Bundle, embedder: WordEmbedder) -> Callable[..., Server]:
    words = ["write", "a", "headline", "for", "this", "news", "story"]

    def make(**limits: Any) -> Server:
        decode = lambda ids: " ".join(words[i] for i in ids)  # noqa: E731
        return Server(lambda: Routing(word_bundle, embedder, decode, Limits(**{**PATIENT, **limits})))

    return make


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    return make_server()


@pytest.fixture
def adapter_of(word_bundle: Bundle) -> Callable[[str], str]:
    return {cluster.name: cluster.adapter for cluster in word_bundle.clusters}.__getitem__
