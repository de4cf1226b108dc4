"""Small random base models of unusual kinds: which of their modules get adapters."""

import re
from typing import Any

import pytest
import torch
from test_sft import RECORDS
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)

from fedrouter.builtin import base_path
from fedrouter.config import LoraSettings, TrainSettings
from fedrouter.errors import ModelError
from fedrouter.models import load_tokenizer
from fedrouter.train.client.sft import AdapterTrainer
from fedrouter.train.client.targets import adapted, check_targets, left_out

IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SHAPE: dict[str, Any] = {
    **IDS,
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
}


def made(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.requires_grad_(False)


def gemma3() -> PreTrainedModel:
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**SHAPE), vision_config=vision, mm_tokens_per_image=4,
        boi_token_index=10, eoi_token_index=11, image_token_index=12,
    )  # fmt: skip
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config).requires_grad_(False)


def moe() -> PreTrainedModel:
    experts: dict[str, Any] = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 1,
    }
    return made(Qwen3MoeConfig(**SHAPE, **experts))


def trained(model: PreTrainedModel, lora: LoraSettings) -> list[str]:
    """Take one step; return the names of the modules that got adapters."""
    tokenizer = load_tokenizer(base_path("builtin:tiny"))
    trainer = AdapterTrainer(model, tokenizer, lora, TrainSettings(batch_size=2), seed=0)
    trainer.rehearse(RECORDS[:2], 1e-3)
    names = {re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", name) for name in trainer.state()}
    return sorted(names)


def test_a_base_that_cannot_be_served_is_refused() -> None:
    small = GPT2Config(vocab_size=2048, n_positions=128, n_embd=32, n_layer=1, n_head=2, **IDS)
    with pytest.raises(ModelError, match="vLLM serves no adapters on GPT2LMHeadModel"):
        check_targets(made(small), "all-linear")


@pytest.mark.parametrize(("name", "what"), [("embed_tokens", "embedding"), ("lm_head", "output layer")])
def test_embeddings_and_the_output_layer_are_refused(name: str, what: str) -> None:
    model = made(LlamaConfig(**SHAPE))
    with pytest.raises(ModelError, match=f"lora.target_modules: {name} is the base's {what}"):
        check_targets(model, ["q_proj", name])
    check_targets(model, ["q_proj", "v_proj"])
    with pytest.raises(ModelError, match="input_layernorm is no linear layer"):
        check_targets(model, ["input_layernorm"])


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_the_reported_modules_get_adapters(targets: str | list[str]) -> None:
    for model in (made(LlamaConfig(**SHAPE)), gemma3(), moe()):
        reported = sorted(adapted(model, targets))
        check_targets(model, targets)
        assert trained(model, LoraSettings(rank=2, target_modules=targets)) == reported


def test_only_the_language_model_of_a_multimodal_model_is_trained() -> None:
    model = gemma3()
    names = adapted(model, "all-linear")
    assert names and all(".language_model." in f".{name}" for name in names)
    assert any("vision" in name and isinstance(m, torch.nn.Linear) for name, m in model.named_modules())
    assert "language model" in left_out(model)[0]
    assert left_out(made(LlamaConfig(**SHAPE))) == []


def test_fused_experts_get_no_adapters_and_are_reported() -> None:
    (line,) = left_out(moe())
    assert re.fullmatch(
        r"the base's experts are fused and get no adapters: \d+% of its weights are not trained", line
    )
