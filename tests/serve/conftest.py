"""A bundle without a model, and a server around it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from echo import DIM, TASKS, Server, WordEmbedder

from fedrouter.bundle import Bundle, write_bundle
from fedrouter.embed import probe
from fedrouter.serve.limits import Limits
from fedrouter.serve.routing import Routing
from fedrouter.types import BaseSpec, RoutingSpace, TaskCluster

RANK = 8


@pytest.fixture(scope="session")
def word_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    embedder = WordEmbedder()
    rng = np.random.default_rng(0)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    adapters = [
        {
            f"{module}.lora_A.weight": rng.normal(size=(RANK, 16)).astype(np.float32),
            f"{module}.lora_B.weight": rng.normal(size=(16, RANK)).astype(np.float32),
        }
        for _ in TASKS
    ]
    return write_bundle(
        tmp_path_factory.mktemp("serve") / "bundle",
        base=BaseSpec("words", None, "words-1"),
        embedder=embedder.spec,
        clusters=[TaskCluster(name, "", 10, ("a", "b"), {name: 10}, radius=3.0) for name in TASKS],
        adapters=adapters,
        adapter_config={"peft_type": "LORA", "r": RANK, "target_modules": ["q_proj"]},
        space=RoutingSpace(
            np.zeros(DIM, np.float32),
            np.eye(DIM, dtype=np.float32),
            embedder.embed(list(TASKS.values())),
            tuple(range(len(TASKS))),
        ),
        probe_vectors=probe(embedder),
        fallback="base",
        versions={},
    )


@pytest.fixture
def embedder() -> WordEmbedder:
    return WordEmbedder()


@pytest.fixture
def make_server(word_bundle: Bundle, embedder: WordEmbedder) -> Callable[..., Server]:
    words = ["write", "a", "headline", "for", "this", "news", "story"]

    def make(**limits: Any) -> Server:
        decode = lambda ids: " ".join(words[i] for i in ids)  # noqa: E731
        return Server(lambda: Routing(word_bundle, embedder, decode, Limits(**limits)))

    return make


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    return make_server()


@pytest.fixture
def adapter_of(word_bundle: Bundle) -> Callable[[str], str]:
    return {cluster.name: cluster.adapter for cluster in word_bundle.clusters}.__getitem__
