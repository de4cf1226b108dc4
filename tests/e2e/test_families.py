"""Any causal language model: tiny random ones of several families go from training to plain PEFT."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
)

from fedrouter.builtin import base_path
from fedrouter.bundle import load_bundle
from fedrouter.config import load_config
from fedrouter.train.run import train

SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
FAMILIES: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen": Qwen3Config,
    "gemma": Gemma3TextConfig,
    "mistral": MistralConfig,
    "phi": Phi3Config,
}
SETTINGS = [
    "data.num_clients=2",
    "data.partition=all",
    "data.num_per_task=8",
    "train.rounds=1",
    "train.steps=4",
    "train.batch_size=4",
    "cluster.global=2",
    "lora.rank=2",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_from_training_to_plain_peft(family: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(base_path("builtin:tiny"), base, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[family](**SHAPE)).save_pretrained(base)
    config = load_config(None, [*SETTINGS, f"base.model={base}"])
    train(config, tmp_path / "run", Console(quiet=True))
    bundle = load_bundle(tmp_path / "run" / "bundle")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == 2048
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        plain = model(ids).logits
        for cluster in bundle.clusters:
            adapted = PeftModel.from_pretrained(model, bundle.adapter_path(cluster))
            assert not torch.allclose(adapted(ids).logits, plain), cluster.name
            model = adapted.unload()
