"""Cost of routing with a real language model as base, and with a base ten times larger.

python benchmarks/real_base.py       SmolLM2-135M-Instruct (make smollm2), and a random Llama of 1.1 B

Each base gets a bundle of the four real tasks from one short round of ``fedrouter train``. ``fedrouter
serve`` serves it and gets test prompts of the four tasks. Routing times are those in
``x-fedrouter-routing-ms``. Answers have one token, because a random base has no useful answers.
"""

import argparse
import asyncio
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
from common import SHARED, report
from rich.console import Console
from routing_data import SMOLLM2
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fedrouter.bundle import load_bundle
from fedrouter.config_file import load_config
from fedrouter.decide import route_texts
from fedrouter.embed import load_embedder
from fedrouter.route import Router
from fedrouter.serve.checks import free_port
from fedrouter.serve.launch import Options, prepare
from fedrouter.serve.process import running
from fedrouter.train.run import train

TASKS = ("paraphrase", "data_to_text", "dialogue_summary", "headline")
CONCURRENCY = 16


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--asked", type=int, default=320, help="prompts for SmolLM2, sent 16 at a time")
    options = parser.parse_args()
    measured = {}
    with tempfile.TemporaryDirectory() as directory:
        room = Path(directory)
        for name, base, asked in (
            ("SmolLM2", SMOLLM2, options.asked),
            ("random 1B", random_llama(room / "llama"), options.asked // 4),
        ):
            measured[name] = {
                **one_prompt(bundle := trained(base, room / name)),
                **crowd(bundle, room, asked),
            }
            shutil.rmtree(bundle.parent)
    rows: list[tuple[str, str, str, bool | None]] = []
    for name, found in measured.items():
        rows += [
            (f"{name}: one prompt of 128 tokens, one core, median", f"{found['one_ms']:.1f} ms", "≤ 15 ms",
             found["one_ms"] <= 15),
            (f"{name}: routing with {CONCURRENCY} clients, p50", f"{found['p50_ms']:.0f} ms", "", None),
            (f"{name}: routing with {CONCURRENCY} clients, p95", f"{found['p95_ms']:.0f} ms", "≤ 150 ms",
             found["p95_ms"] <= 150),
        ]  # fmt: skip
    ratio = measured["random 1B"]["one_ms"] / measured["SmolLM2"]["one_ms"]
    rows.append(("one prompt, random 1B ÷ SmolLM2", f"{ratio:.2f}", "0.8 to 1.2", bool(0.8 <= ratio <= 1.2)))
    report("real_base", {"bases": measured, "asked": options.asked}, rows)


def random_llama(path: Path) -> Path:
    """Write a random bfloat16 Llama with the shapes of Llama-3.2-1B and SmolLM2's tokenizer."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=2048,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(path)
    AutoTokenizer.from_pretrained(SMOLLM2).save_pretrained(path)
    return path


def trained(base: Path, out: Path) -> Path:
    """Train one step per task cluster; return the bundle's path."""
    sources = [str(SHARED / "data" / "four_tasks" / f"{task}.train.jsonl") for task in TASKS]
    settings = [
        f"base.model={json.dumps(str(base))}", f"data.source={json.dumps(sources)}",
        "data.partition=single", "data.num_clients=4", "data.max_per_client=200",
        "train.rounds=1", "train.steps=1", "train.batch_size=1", "train.max_length=128",
    ]  # fmt: skip
    return train(load_config(None, settings), out, Console(stderr=True)).path


def prompts(task: str) -> list[str]:
    """Return a task's test prompts."""
    file = SHARED / "data" / "four_tasks" / f"{task}.test.jsonl"
    return [json.loads(line)["instruction"] for line in file.read_text(encoding="utf-8").splitlines()]


def one_prompt(path: Path) -> dict[str, float]:
    """Embed and route prompts of 128 tokens one by one, with one thread; return the median time, ms."""
    bundle = load_bundle(path)
    embedder = load_embedder(bundle.embedder, bundle.base)
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    ids = tokenizer(" ".join(prompts("dialogue_summary")))["input_ids"]
    texts = [str(tokenizer.decode(ids[i : i + 128])) for i in range(0, 128 * 60, 128)]
    router, took = Router(bundle), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        for text in texts:
            began = time.perf_counter()
            route_texts(router, embedder, [text])
            took.append(1000 * (time.perf_counter() - began))
    torch.set_num_threads(threads)
    return {"one_ms": float(np.median(took[10:]))}


def crowd(path: Path, room: Path, asked: int) -> dict[str, float]:
    """Serve a bundle and send it ``CONCURRENCY`` prompts at a time; return quantiles of routing time, ms."""
    _, command = prepare(path, Options(port=free_port()))
    texts = [text for row in zip(*map(prompts, TASKS), strict=False) for text in row][:asked]
    with running(command, room / "serve.log", 1800):
        took = asyncio.run(_ask(command.url, texts))
    return {"p50_ms": float(np.median(took)), "p95_ms": float(np.percentile(took, 95))}


async def _ask(url: str, texts: list[str]) -> list[float]:
    took: list[float] = []
    queue = iter(texts)
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(1800)) as client:

        async def worker() -> None:
            for text in queue:
                body: dict[str, Any] = {
                    "model": "fedrouter", "max_tokens": 1, "messages": [{"role": "user", "content": text}]
                }  # fmt: skip
                async with client.post("/v1/chat/completions", json=body) as answer:
                    answer.raise_for_status()
                    took.append(float(answer.headers["x-fedrouter-routing-ms"]))

        await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))
    return took[CONCURRENCY:]


if __name__ == "__main__":
    main()
