"""A bundle without a model, and a server around it."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from echo import DIM, TASKS, Server, WordEmbedder

from fedrouter.bundle import Bundle, write_bundle
from fedrouter.embed import probe
from fedrouter.serve.access import Access
from fedrouter.serve.routing import Routing
from fedrouter.types import BaseSpec, RoutingSpace, TaskCluster

RANK = 8


def write_words(path: Path, clients: Mapping[str, tuple[str, ...]], **changes: Any) -> Bundle:
    """Write a bundle of one task cluster for each of TASKS; ``clients`` are those of each, a and b else."""
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
    arguments: dict[str, Any] = {
        "base": BaseSpec("words", None, "words-1"),
        "embedder": embedder.spec,
        "clusters": [
            TaskCluster(name, "", 10, clients.get(name, ("a", "b")), {name: 10}, radius=3.0) for name in TASKS
        ],
        "adapters": adapters,
        "adapter_config": {"peft_type": "LORA", "r": RANK, "target_modules": ["q_proj"]},
        "space": RoutingSpace(
            np.zeros(DIM, np.float32),
            np.eye(DIM, dtype=np.float32),
            embedder.embed(list(TASKS.values())),
            tuple(range(len(TASKS))),
        ),
        "probe_vectors": probe(embedder),
        "fallback": "base",
        "versions": {},
        "generalist": adapters[0],
    }
    return write_bundle(path, **{**arguments, **changes})


@pytest.fixture(scope="session")
def word_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_words(tmp_path_factory.mktemp("serve") / "bundle", {})


@pytest.fixture(scope="session")
def tenants_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Client ann has headlines, bob summaries, and both have the third task."""
    clients = {"headline": ("ann",), "summary": ("bob",), "tâche": ("ann", "bob")}
    return write_words(tmp_path_factory.mktemp("tenants") / "bundle", clients)


@pytest.fixture
def embedder() -> WordEmbedder:
    return WordEmbedder()


def serve_words(
    bundle: Bundle, embedder: WordEmbedder, fallback: str | None = None, access: Access | None = None
) -> Server:
    words = ["write", "a", "headline", "for", "this", "news", "story"]
    return Server(
        lambda: Routing(bundle, embedder, lambda ids: " ".join(words[i] for i in ids), fallback),
        access=access,
    )


@pytest.fixture
def server(word_bundle: Bundle, embedder: WordEmbedder) -> Server:
    return serve_words(word_bundle, embedder)


@pytest.fixture
def serve(tenants_bundle: Bundle, embedder: WordEmbedder) -> Callable[..., Server]:
    """Serve ``tenants_bundle`` with a fallback or access rules."""
    return partial(serve_words, tenants_bundle, embedder)


@pytest.fixture
def adapter_of(word_bundle: Bundle) -> Callable[[str], str]:
    return {cluster.name: cluster.adapter for cluster in word_bundle.clusters}.__getitem__
