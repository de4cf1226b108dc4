"""Any causal language model: tiny random ones of several families are trained, and run in PEFT and vLLM."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

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
from fedrouter.bundle import Bundle, load_bundle
from fedrouter.config_file import load_config
from fedrouter.train.run import train

SHAPE: dict[str, Any] = {
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


Trained = Callable[[str], tuple[Path, Bundle]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train a family's base once; return where the base is, and the bundle."""

    @cache
    def run(family: str) -> tuple[Path, Bundle]:
        base = tmp_path_factory.mktemp(family) / "base"
        shutil.copytree(base_path("builtin:tiny"), base, ignore=shutil.ignore_patterns("*.safetensors"))
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(FAMILIES[family](**SHAPE)).save_pretrained(base)
        config = load_config(None, [*SETTINGS, f"base.model={base}"])
        train(config, base.parent / "run", Console(quiet=True))
        return base, load_bundle(base.parent / "run" / "bundle")

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_from_training_to_plain_peft(family: str, trained: Trained) -> None:
    base, bundle = trained(family)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    assert model.config.vocab_size == weight.shape[0] == 2048
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        plain = model(ids).logits
        for cluster in bundle.clusters:
            adapted = PeftModel.from_pretrained(model, bundle.adapter_path(cluster))
            assert not torch.allclose(adapted(ids).logits, plain), cluster.name
            model = adapted.unload()


ASK_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

for family, base, adapter in json.load(sys.stdin):
    llm = LLM(base, dtype="float32", max_model_len=128, enforce_eager=True, enable_lora=True, max_lora_rank=8,
              max_loras=2, seed=0)
    wanted = SamplingParams(max_tokens=1, temperature=0, logprobs=5)
    prompt = {"prompt_token_ids": list(range(10, 30))}
    for lora in (None, LoRARequest("mine", 1, adapter)):
        (answer,) = llm.generate([prompt], wanted, lora_request=lora, use_tqdm=False)
        found = {token: p.logprob for token, p in answer.outputs[0].logprobs[0].items()}
        print("FOUND", json.dumps([family, lora is not None, found]), flush=True)
    llm.llm_engine.engine_core.shutdown()
    del llm
"""


def test_vllm_computes_with_each_familys_adapter_what_peft_does(trained: Trained) -> None:
    """All families in one process: importing vLLM takes longer than loading a small model."""
    asked, want = [], {}
    ids = torch.arange(10, 30)[None]
    for family in FAMILIES:
        base, bundle = trained(family)
        adapter = bundle.adapter_path(bundle.clusters[0])
        asked.append((family, str(base), str(adapter)))
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():
            want[family, False] = model(ids).logits[0, -1].log_softmax(-1)
            want[family, True] = PeftModel.from_pretrained(model, adapter)(ids).logits[0, -1].log_softmax(-1)
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK_VLLM],
        input=json.dumps(asked),
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    found = [
        json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("FOUND")
    ]
    assert len(found) == 2 * len(FAMILIES), done.stderr[-3000:]
    for family, adapted, logprobs in found:
        likely, other = want[family, adapted], want[family, not adapted]
        for token, logprob in logprobs.items():
            assert logprob == pytest.approx(float(likely[int(token)]), abs=2e-3), (family, adapted)
        assert any(abs(p - float(other[int(t)])) > 4e-3 for t, p in logprobs.items()), (
            "the adapter makes none"
        )
