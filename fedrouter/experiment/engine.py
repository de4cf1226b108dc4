"""Engines that generate the answers to test prompts, with greedy decoding.

``Transformers`` runs in this process, on a GPU if there is one; all adapters of a bundle share its batches
(stacked.py). ``Vllm`` uses a server that has the adapters of many cells. A cell's results name the engine,
because rounding differs between them and with it some words.
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from fedrouter.bundle import CONFIG, Bundle, read_weights
from fedrouter.embed import Embedder, HiddenStateEmbedder
from fedrouter.errors import ServingError
from fedrouter.evaluate.endpoint import Endpoint
from fedrouter.models import load_base, load_tokenizer, read_json, render_prompt
from fedrouter.route import BASE_NAME
from fedrouter.stacked import StackedAdapters
from fedrouter.types import AdapterState, Turn

ROWS = 16  # prompts per block; a block has one adapter
TOKENS_CPU, TOKENS_GPU = 16_384, 131_072  # tokens of prompts and answers in one batch, with padding
CONCURRENCY, TIMEOUT_S = 32, 300.0  # of requests to a server

Conversation = Sequence[Turn]


class Engine(Protocol):
    """Generates answers with adapters."""

    name: str

    def answers(
        self, adapters: Mapping[str, Path], asked: Sequence[tuple[str, Conversation]], max_tokens: int
    ) -> list[str]:
        """Return the answer to each (adapter, conversation); for a name not in ``adapters`` the base's."""
        ...


class Transformers:
    """The base model in this process, with stacked adapters.

    Parameters
    ----------
    path : directory of the base model.
    """

    name = "transformers"

    def __init__(self, path: Path, dtype: str, device: str, chat_template: str | None = None):
        self._model: Any = load_base(path, dtype, device).eval()
        self._tokenizer = load_tokenizer(path, chat_template)
        self._tokens = TOKENS_GPU if device == "cuda" else TOKENS_CPU
        ends = self._model.generation_config.eos_token_id
        self._ends = {self._tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def embedder(self, bundle: Bundle) -> Embedder | None:
        """Return the bundle's embedder if it is this base, so that the base is loaded only once."""
        if bundle.embedder.kind != "base":
            return None
        return HiddenStateEmbedder(self._model.base_model, self._tokenizer, bundle.embedder)

    @torch.inference_mode()
    def answers(
        self, adapters: Mapping[str, Path], asked: Sequence[tuple[str, Conversation]], max_tokens: int
    ) -> list[str]:
        """Return the answers, in the order of ``asked``; see ``Engine``."""
        states = {name: read_weights(path) for name, path in adapters.items()}
        like = next(iter(states.values()))
        base: AdapterState = {name: 0 * array for name, array in like.items()}
        stack = StackedAdapters(self._model, like, _scale(next(iter(adapters.values()))))
        matrix = stack.matrix([base, *states.values()], self._model.device)
        row_of = {name: i for i, name in enumerate(states, start=1)}
        prompts = [self._ids(turns, max_tokens) for _, turns in asked]
        texts = [""] * len(asked)
        with stack.attached():
            for blocks in self._batches([row_of.get(name, 0) for name, _ in asked], prompts, max_tokens):
                rows = [i for _, block in blocks for i in (block * ROWS)[:ROWS]]
                stack.use(matrix[[adapter for adapter, _ in blocks]], self._model.dtype)
                for i, text in zip(rows, self._generate([prompts[i] for i in rows], max_tokens), strict=True):
                    texts[i] = text
        return texts

    def _ids(self, turns: Conversation, max_tokens: int) -> list[int]:
        text = render_prompt(self._tokenizer, turns)
        found: Any = self._tokenizer(text, add_special_tokens=False, truncation=False)
        return list(found["input_ids"][-(self._model.config.max_position_embeddings - max_tokens) :])

    def _batches(
        self, adapters: Sequence[int], prompts: Sequence[list[int]], max_tokens: int
    ) -> list[list[tuple[int, list[int]]]]:
        """Return batches of blocks (adapter, up to ``ROWS`` prompts) of similar length."""
        order = sorted(range(len(prompts)), key=lambda i: (adapters[i], len(prompts[i]), i))
        blocks: list[tuple[int, list[int]]] = []
        for i in order:
            if not blocks or blocks[-1][0] != adapters[i] or len(blocks[-1][1]) == ROWS:
                blocks.append((adapters[i], []))
            blocks[-1][1].append(i)
        blocks.sort(key=lambda block: len(prompts[block[1][-1]]))
        batches: list[list[tuple[int, list[int]]]] = []
        for block in blocks:
            longest = len(prompts[block[1][-1]]) + max_tokens
            if not batches or (len(batches[-1]) + 1) * ROWS * longest > self._tokens:
                batches.append([])
            batches[-1].append(block)
        return batches

    def _generate(self, prompts: Sequence[list[int]], max_tokens: int) -> list[str]:
        width = max(map(len, prompts))
        pad = self._tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        device = self._model.device
        generated = self._model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=pad,
            eos_token_id=sorted(self._ends),
        )
        texts: list[str] = self._tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
        return texts


class Vllm:
    """A server that has all adapters under the same names.

    Parameters
    ----------
    url : address of ``fedrouter serve`` or of vLLM.
    """

    name = "vllm"

    def __init__(self, url: str):
        self._url = url

    def answers(
        self, adapters: Mapping[str, Path], asked: Sequence[tuple[str, Conversation]], max_tokens: int
    ) -> list[str]:
        """Return the answers, in the order of ``asked``; see ``Engine``.

        Raises
        ------
        ServingError
            If a prompt gets no answer, after retries.
        """
        names = [name if name in adapters else BASE_NAME for name, _ in asked]
        return asyncio.run(
            self._ask([(n, turns) for n, (_, turns) in zip(names, asked, strict=True)], max_tokens)
        )

    async def _ask(self, asked: Sequence[tuple[str, Conversation]], max_tokens: int) -> list[str]:
        semaphore = asyncio.Semaphore(CONCURRENCY)
        async with Endpoint(self._url, api_key=None, timeout_s=TIMEOUT_S, retries=3) as endpoint:

            async def answer_of(name: str, turns: Conversation) -> str:
                async with semaphore:
                    answer = await endpoint.ask(name, turns, max_tokens=max_tokens, temperature=0.0)
                if answer.error is not None:
                    raise ServingError(f"{name} did not answer: {answer.error}")
                return answer.text

            return list(await asyncio.gather(*(answer_of(name, turns) for name, turns in asked)))


def _scale(directory: Path) -> float:
    config = read_json(directory / CONFIG)
    return float(config["lora_alpha"] / config["r"])
