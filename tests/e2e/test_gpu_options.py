"""What GPUs need, as far as it runs on a CPU: bfloat16, gradient checkpointing, a base of four bits."""

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from fedrouter.bundle import Bundle, check_embedder, find_base, load_bundle
from fedrouter.config_file import load_config
from fedrouter.embed import load_embedder
from fedrouter.train.run import train

SETTINGS = [
    "data.num_clients=2",
    "data.partition=all",
    "data.num_per_task=12",
    "train.rounds=2",
    "train.steps=4",
    "train.batch_size=4",
    "cluster.global=2",
    "lora.rank=2",
]


def trained(out: Path, *settings: str) -> Bundle:
    train(load_config(None, [*SETTINGS, *settings]), out, Console(quiet=True))
    return load_bundle(out / "bundle")


def weights(bundle: Bundle) -> list[dict[str, np.ndarray]]:
    return [load_file(bundle.adapter_path(c) / "adapter_model.safetensors") for c in bundle.clusters]


def test_bfloat16_with_gradient_checkpointing(tmp_path: Path) -> None:
    bundle = trained(tmp_path / "a", "base.dtype=bfloat16", "train.gradient_checkpointing=true")
    assert bundle.embedder.dtype == "bfloat16"
    plain = trained(tmp_path / "b", "base.dtype=bfloat16")
    for one, other in zip(weights(bundle), weights(plain), strict=True):
        for name, array in one.items():
            assert array.dtype == np.float32
            np.testing.assert_allclose(array, other[name], atol=2e-3)


def test_a_base_of_four_bits_trains_adapters_whose_embedder_is_the_served_one(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    bundle, plain = trained(tmp_path / "a", "base.quantization=nf4"), trained(tmp_path / "b")
    path = find_base(bundle)
    check_embedder(bundle, load_embedder(bundle.embedder, bundle.base, path))
    np.testing.assert_array_equal(bundle.space.centroids, plain.space.centroids)
    assert [c.num_examples for c in bundle.clusters] == [c.num_examples for c in plain.clusters]
    for one, other in zip(weights(bundle), weights(plain), strict=True):
        b = [name for name in one if ".lora_B." in name]
        assert any(np.abs(one[name]).max() > 0 for name in b), "it has learned something"
        assert any(not np.array_equal(one[name], other[name]) for name in b), "of other weights"
