"""All adapters of a round trained in one batch: for a small base on a large GPU.

What each adapter learns is what TRL's trainer (sft.py) teaches it alone: mean loss over its batch's answer
tokens, AdamW, gradients cut to length 1. The order of rows differs, and so does rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedrouter.config import LoraSettings, TrainSettings
from fedrouter.stacked import StackedAdapters
from fedrouter.train.client.client import Client
from fedrouter.train.client.rows import Tokeniser
from fedrouter.train.client.sft import IGNORED, AdapterTrainer
from fedrouter.train.client.workers import StandIn
from fedrouter.train.federation import Trained, Trainer
from fedrouter.train.local import LocalFederation, tried
from fedrouter.types import (
    AdapterState,
    TrainFailure,
    TrainReply,
    TrainRequest,
    ValidationReply,
    ValidationRequest,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS = 32_768  # padded tokens in one forward pass, at most; fewer for a larger base
LARGE = 40_000_000  # parameters of a base that gets fewer
LONGEST = 1.0  # L2 norm that a gradient is cut to, as the Trainer's default

Request = TypeVar("Request", TrainRequest, ValidationRequest)
Row = tuple[list[int], list[int]]  # token ids and labels


@dataclass(frozen=True, slots=True)
class Job:
    """One adapter to train (``steps`` above 0) or to judge."""

    adapter: AdapterState
    data: Dataset
    steps: int = 0
    learning_rate: float = 0.0
    seed: int = 0


class StackedTrainer(AdapterTrainer):
    """Trains and judges many adapters at once on the resident base; parameters as ``AdapterTrainer``."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        lora: LoraSettings,
        settings: TrainSettings,
        seed: int,
        tokeniser: Tokeniser | None = None,
    ):
        super().__init__(model, tokenizer, lora, settings, seed, tokeniser)
        self._base = self.model.get_base_model()
        self._stack = StackedAdapters(self._base, self.state(), lora.alpha / lora.rank, lora.dropout)
        parameters = sum(p.numel() for p in self._base.parameters())
        self._tokens = int(TOKENS * min(1.0, LARGE / parameters))
        self._decoder, self._head = self._base.get_decoder(), self._base.get_output_embeddings()
        self._plain = self._head_is_all()

    def train(
        self, adapter: AdapterState, data: Dataset, steps: int, learning_rate: float, seed: int
    ) -> Trained:
        """Train one adapter; see ``AdapterTrainer.train``."""
        return self.train_all([Job(adapter, data, steps, learning_rate, seed)])[0]

    def loss(self, adapter: AdapterState, data: Dataset) -> tuple[float, int]:
        """Return one adapter's mean loss on ``data``; see ``AdapterTrainer.loss``."""
        return self.losses([Job(adapter, data)])[0]

    def train_all(self, jobs: Sequence[Job]) -> list[Trained]:
        """Train every job's adapter for its steps; results in the jobs' order."""
        began = perf_counter()
        order = sorted(range(len(jobs)), key=lambda i: -jobs[i].steps)  # who is done first lies last
        settings = self.settings
        batches = [_batches(jobs[i], settings.step_size) for i in order]
        sent = self._stack.matrix([jobs[i].adapter for i in order], self._base.device)
        weights = torch.nn.Parameter(sent.clone())
        # Of the adapters of a round all have one learning rate.
        optimizer = torch.optim.AdamW(
            [weights],
            lr=jobs[0].learning_rate,
            weight_decay=settings.weight_decay,
            fused=weights.device.type == "cuda",
        )
        losses = torch.zeros(len(jobs), device=weights.device)
        done = torch.zeros_like(sent)
        torch.manual_seed(jobs[0].seed)  # of dropout
        self._stack.training = True
        with self._in_place():
            for step in range(jobs[order[0]].steps):
                active = sum(jobs[i].steps > step for i in order)
                losses[:active] += self._step(weights, [next(batches[i]) for i in range(active)])
                if settings.proximal:
                    assert weights.grad is not None
                    weights.grad[:active] += settings.proximal * (weights.detach() - sent)[:active]
                _cut(weights)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                ending = [n for n in range(active) if jobs[order[n]].steps == step + 1]
                if ending:  # its moments go on moving what lies still
                    done[ending] = weights.detach()[ending]
        states = self._stack.states(done)
        mean = (losses.cpu() / torch.tensor([max(jobs[i].steps, 1) for i in order])).tolist()
        seconds = (perf_counter() - began) / len(jobs)
        found = {
            i: Trained(states[n], self._examples(len(jobs[i].data), jobs[i].steps), mean[n], seconds)
            for n, i in enumerate(order)
        }
        return [found[i] for i in range(len(jobs))]

    @torch.no_grad()
    def losses(self, jobs: Sequence[Job]) -> list[tuple[float, int]]:
        """Return each job's mean loss on its rows, nats a completion token, and how many tokens."""
        weights = self._stack.matrix([job.adapter for job in jobs], self._base.device)
        rows = [_rows(job) for job in jobs]
        totals = torch.zeros(len(jobs), device=weights.device)
        counts = [sum(sum(t != IGNORED for t in labels[1:]) for _, labels in own) for own in rows]
        size = self.settings.step_size
        self._stack.training = False
        with self._in_place():
            for start in range(0, max(map(len, rows)), size):
                some = [i for i, own in enumerate(rows) if len(own) > start]
                batches = [rows[i][start : start + size] for i in some]
                for part in self._chunks(batches):
                    picked = torch.tensor([some[i] for i in part], device=weights.device)
                    totals[picked] += self._loss(weights[picked], [batches[i] for i in part], mean=False)
        return [(t / max(n, 1), n) for t, n in zip(totals.tolist(), counts, strict=True)]

    def _step(self, weights: Tensor, batches: Sequence[list[Row]]) -> Tensor:
        """Add one step's gradients to ``weights``; return each adapter's loss."""
        losses = torch.zeros(len(batches), device=weights.device)
        for part in self._chunks(batches):
            picked = torch.tensor(part, device=weights.device)
            loss = self._loss(weights[picked], [batches[i] for i in part])
            loss.sum().backward()
            losses[picked] = loss.detach()
        return losses

    def _chunks(self, batches: Sequence[list[Row]]) -> Iterator[list[int]]:
        """Yield the batches in parts of bounded size, those of like length together."""
        longest = [max(len(ids) for ids, _ in batch) for batch in batches]
        part: list[int] = []
        for i in sorted(range(len(batches)), key=lambda i: (longest[i], i)):
            rows = max(len(batches[j]) for j in [*part, i])
            if part and (len(part) + 1) * rows * longest[i] > self._tokens:
                yield part
                part = []
            part.append(i)
        yield part

    def _loss(self, weights: Tensor, batches: Sequence[list[Row]], mean: bool = True) -> Tensor:
        """Return each adapter's loss on its batch, (n,): the mean over answer tokens, or the sum."""
        rows = max(map(len, batches))
        blank: tuple[list[int], list[int]] = [0], [IGNORED]
        filled = [row for batch in batches for row in [*batch, *([blank] * (rows - len(batch)))]]
        ids = pad_sequence([torch.tensor(row) for row, _ in filled], True)  # (n · rows, T)
        labels = pad_sequence([torch.tensor(row) for _, row in filled], True, IGNORED)[:, 1:]
        learned = (labels != IGNORED).flatten().nonzero().squeeze(1)  # where answer tokens stand
        owner = learned // (rows * labels.shape[1])  # whose each is
        wanted = labels.flatten()[learned]
        device = weights.device
        ids, learned, owner, wanted = (t.to(device, non_blocking=True) for t in (ids, learned, owner, wanted))
        self._stack.use(weights, self._base.dtype)
        # No mask: what pads lies behind each row, where a causal model does not look.
        if self._plain:
            states = self._decoder(input_ids=ids, use_cache=False).last_hidden_state
            logits = self._head(states[:, :-1].flatten(0, 1)[learned])
        else:
            logits = self._base(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)[learned]
        each = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
        total = torch.zeros(len(batches), device=device).index_add(0, owner, each)
        if not mean:
            return total
        return total / torch.bincount(owner, minlength=len(batches)).clamp(min=1)

    @torch.no_grad()
    def _head_is_all(self) -> bool:
        """Tell whether logits are the output embeddings of the last states, without scale or cap."""
        ids = torch.arange(8, device=self._base.device)[None]
        with self._in_place():
            whole = self._base(input_ids=ids, use_cache=False).logits
            ours = self._head(self._decoder(input_ids=ids, use_cache=False).last_hidden_state)
        return bool(torch.equal(whole, ours))

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Have our adapters in the base instead of PEFT's."""
        self.model.disable_adapter_layers()
        self.model.eval()  # nothing but dropout asks for it, and adapters have their own
        try:
            with self._stack.attached():
                yield
        finally:
            self.model.enable_adapter_layers()


class StackedFederation(LocalFederation):
    """Clients in this process whose adapters are trained side by side."""

    def __init__(self, clients: Sequence[Client], trainer: StackedTrainer):
        super().__init__(clients, trainer)
        self._stacked = trainer

    def train(self, requests: Sequence[TrainRequest]) -> Iterator[TrainReply | TrainFailure]:
        """Train what is requested, all at once."""
        return self._together(requests, lambda r, trainer: self.clients[r.client].train(r, trainer))

    def validate(self, requests: Sequence[ValidationRequest]) -> Iterator[ValidationReply | TrainFailure]:
        """Have each request's client judge an adapter, all at once."""
        return self._together(requests, lambda r, trainer: self.clients[r.client].validate(r, trainer))

    def _together(self, requests: Sequence[Request], ask: Callable[[Request, Trainer], Any]) -> Iterator[Any]:
        """Let every client come to where it waits for the model, then do all that wait in one go."""
        table = _Table()
        seat = _Seat(self._stacked, table)
        with ThreadPoolExecutor(max(len(requests), 1)) as pool:
            answers = [pool.submit(tried, request, seat, ask) for request in requests]
            for answer in answers:
                answer.add_done_callback(lambda _: table.knock())
            table.wait(lambda: len(table.jobs) + sum(a.done() for a in answers) >= len(answers))
            try:
                jobs = [job for job, _ in table.jobs]
                if jobs:
                    what = self._stacked.train_all if jobs[0].steps else self._stacked.losses
                    for (_, promise), result in zip(table.jobs, what(jobs), strict=True):
                        promise.set_result(result)
            except BaseException as error:
                for _, promise in table.jobs:
                    if not promise.done():
                        promise.set_exception(error)
                raise
            for answer in answers:
                yield answer.result()


class _Table:
    """Where clients' jobs lie until all are there."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Job, Future[Any]]] = []
        self._changed = Condition()

    def knock(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def put(self, job: Job) -> "Future[Any]":
        promise: Future[Any] = Future()
        with self._changed:
            self.jobs.append((job, promise))
            self._changed.notify_all()
        return promise

    def wait(self, enough: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(enough)


class _Seat(StandIn):
    """A trainer as clients see it: what they ask for waits for the others."""

    def __init__(self, stacked: StackedTrainer, table: _Table):
        super().__init__(stacked)
        self._table = table

    def train(
        self, adapter: AdapterState, data: Dataset, steps: int, learning_rate: float, seed: int
    ) -> Trained:
        trained: Trained = self._table.put(Job(adapter, data, steps, learning_rate, seed)).result()
        return trained

    def loss(self, adapter: AdapterState, data: Dataset) -> tuple[float, int]:
        loss, num_tokens = self._table.put(Job(adapter, data)).result()
        return loss, num_tokens


def _batches(job: Job, size: int) -> Iterator[list[Row]]:
    """Yield batches of (ids, labels), epoch after epoch, each in an order of its own."""
    rows = _rows(job)
    draw = np.random.default_rng(job.seed)
    while True:
        order = draw.permutation(len(rows))
        for start in range(0, len(rows), size):
            yield [rows[i] for i in order[start : start + size]]


def _rows(job: Job) -> list[Row]:
    columns: Any = job.data.to_dict()
    return list(zip(columns["input_ids"], columns["labels"], strict=True))


def _cut(weights: torch.nn.Parameter) -> None:
    """Cut each adapter's gradient to length 1, as the Trainer cuts one."""
    assert weights.grad is not None
    lengths = torch.linalg.vector_norm(weights.grad, dim=1, keepdim=True)
    weights.grad *= (LONGEST / (lengths + 1e-6)).clamp(max=1.0)
