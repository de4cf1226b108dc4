"""Train the tokenizer and weights of ``builtin:tiny`` on generated text.

    torchrun --nproc-per-node 2 scripts/pretrain_tiny.py

A Llama with 3.5 M parameters (6 layers, width 192, head size 64, tied embeddings, context 512) learns
next-token prediction on the text of ``pretrain_text.py`` in PHASES, 3,200 steps of 8,192 tokens. Muon
optimizes hidden matrices, AdamW the rest; weights are stored in float32 and computed with in bfloat16. Two
single-threaded processes average their gradients; their number changes the result. It takes fifty minutes on
two cores, 0.8 to 1 second per step. No (prompt, answer) pair of a built-in task is in the text.

The shipped weights were made with this file at commit 68f6758. Since then the built-in grammars have got more
training values, which changes the text; other processors and PyTorch releases also round differently.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from pretrain_text import COPYING, JOINING, VERDICTS, Mix, documents
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 7
ROWS, LENGTH = 16, 256  # per process and step
MUON_LR, ADAM_LR, WARMUP, COOLDOWN = 0.015, 3e-3, 60, 0.5
VERDICT_WEIGHT = 8.0  # of verdict tokens in the second phase's loss; one in thirty tokens is a verdict
VOCABULARY = 2048
OUT = Path(__file__).parents[1] / "fedrouter" / "builtin" / "tiny"


@dataclass(frozen=True)
class Phase:
    """A phase of training with its own optimizers."""

    name: str
    mix: Mix
    steps: int
    planned: int  # step at which the learning rate would reach zero; copying stops earlier
    share: float  # factor on the peak learning rates


PHASES = (
    Phase("copy", COPYING, 1200, 1500, 1.0),
    Phase("join", JOINING, 2000, 2000, 0.8),
)
TEMPLATE = """{% for m in messages %}{% if m['role']=='user' %}### Instruction:
{{m['content']}}

### Response:
{% elif m['role']=='system' %}{{m['content']}}

{% elif m['role']=='assistant' %}{{m['content']}}</s>{% endif %}{% endfor %}"""
# Capitalised words and digits never include the space before them, so that a name has the same tokens
# everywhere, also at the start of an answer.
PIECES = r" ?[a-z]+| ?[A-Z]?[^\sA-Za-z0-9]+|[A-Z][a-z]*|[0-9]|\s"


def train_tokenizer() -> None:
    """Train the byte-level BPE on 40,000 documents and write the tokenizer files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    source = documents(f"{SEED}/tokenizer", COPYING)
    tokenizer.train_from_iterator((next(source) for _ in range(40_000)), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(OUT)


def batches(tokenizer: PreTrainedTokenizerFast, phase: Phase, rank: int) -> Iterator[torch.Tensor]:
    """Yield (ROWS, LENGTH) int64 token ids; documents end with ``</s>`` and follow each other."""
    seed = f"{SEED}/{rank}" if phase is PHASES[0] else f"{SEED}/{rank}/{phase.name}"
    source, ids = documents(seed, phase.mix), list[int]()
    for _ in range(phase.steps):
        while len(ids) < ROWS * LENGTH:
            ids += [*tokenizer.encode(next(source)), tokenizer.eos_token_id]
        yield torch.tensor(ids[: ROWS * LENGTH]).view(ROWS, LENGTH)
        ids = ids[ROWS * LENGTH :]


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, phase: Phase, rank: int, world: int
) -> None:
    """Train the bfloat16 model in place over one phase; rank 0 saves every 100 steps."""
    masters = {name: p.detach().float() for name, p in model.named_parameters()}
    matrices = [p for name, p in masters.items() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in masters.items() if p.ndim != 2 or "embed" in name]
    peaks = (phase.share * MUON_LR, phase.share * ADAM_LR)
    optimizers = (
        torch.optim.Muon(matrices, lr=peaks[0], weight_decay=0.01),
        torch.optim.AdamW(rest, lr=peaks[1], betas=(0.9, 0.95)),
    )
    weight = torch.ones(VOCABULARY)
    if phase.mix is not COPYING:
        tokens = [tokenizer.encode(space + word) for pair in VERDICTS for word in pair for space in ("", " ")]
        weight[[ids[0] for ids in tokens if len(ids) == 1]] = VERDICT_WEIGHT
    forward = torch.compile(model)
    started = time.monotonic()
    for step, ids in enumerate(batches(tokenizer, phase, rank)):
        logits = forward(ids, use_cache=False).logits[:, :-1]  # (ROWS, LENGTH - 1, VOCABULARY)
        loss = cross_entropy(logits.float().reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1), weight)
        model.zero_grad()
        loss.backward()
        flat = torch.cat([p.grad.float().view(-1) for p in model.parameters() if p.grad is not None])
        dist.all_reduce(flat)
        flat *= min(1.0 / world, 1.0 / (flat.norm().item() + 1e-6))  # mean, then clipped to unit norm
        decay = (phase.planned - step) / (COOLDOWN * phase.planned)
        with torch.no_grad():
            for master, grad in zip(
                masters.values(), flat.split([m.numel() for m in masters.values()]), strict=True
            ):
                master.grad = grad.view_as(master)
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                optimizer.param_groups[0]["lr"] = peak * min((step + 1) / WARMUP, 1.0, decay)
                optimizer.step()
            for p, master in zip(model.parameters(), masters.values(), strict=True):
                p.copy_(master)
        if rank == 0 and step % 20 == 0:
            print(
                f"{phase.name} {step} loss {loss.item():.3f} seconds {time.monotonic() - started:.0f}",
                flush=True,
            )
        if rank == 0 and (step % 100 == 99 or step + 1 == phase.steps):
            model.save_pretrained(OUT)


def main() -> None:
    """Train the tokenizer, then the model phase by phase."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=30))
    if rank == 0:
        train_tokenizer()
    dist.barrier()
    tokenizer = AutoTokenizer.from_pretrained(OUT)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).bfloat16()
    for phase in PHASES:
        train(model, tokenizer, phase, rank, world)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
