"""Bundles for ``WordEmbedder``, which need no model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from echo import DIM, TASKS, WordEmbedder

from fedrouter.bundle import Bundle, write_bundle
from fedrouter.embed import probe
from fedrouter.types import BaseSpec, RoutingSpace, TaskCluster

RANK = 8


def write_word_bundle(
    path: Path,
    seeds: Sequence[int] = (0, 1, 2),
    clients: Mapping[str, tuple[str, ...]] | None = None,
    **changes: Any,
) -> Bundle:
    """Write a bundle of ``TASKS`` with their mean as generalist.

    Adapters of the same task and seed are identical. ``clients``: task → clients, a and b by default.
    """
    embedder, of = WordEmbedder(), clients or {}
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    rank = changes.pop("rank", RANK)
    adapters = []
    for rng in map(np.random.default_rng, seeds):
        a, b = rng.normal(size=(rank, 16)).astype(np.float32), rng.normal(size=(16, rank)).astype(np.float32)
        adapters.append({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b})
    arguments: dict[str, Any] = {
        "base": BaseSpec("words", None, "words-1"),
        "embedder": embedder.spec,
        "clusters": [
            TaskCluster(name, "", 10, of.get(name, ("a", "b")), {name: 10}, radius=3.0) for name in TASKS
        ],
        "adapters": adapters,
        "adapter_config": {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]},
        "space": RoutingSpace(
            np.zeros(DIM, np.float32),
            np.eye(DIM, dtype=np.float32),
            embedder.embed(list(TASKS.values())),
            tuple(range(len(TASKS))),
        ),
        "probe_vectors": probe(embedder),
        "fallback": "base",
        "versions": {},
        "generalist": {name: np.mean([one[name] for one in adapters], axis=0) for name in adapters[0]},
    }
    return write_bundle(path, **{**arguments, **changes})
