"""Train all adapters of a round in one batch: for a small base model on a large GPU.

Each adapter learns what TRL's trainer (sft.py) would teach it alone: mean loss over the answer tokens of its
batch, AdamW, gradients clipped to norm 1. Only the order of rows and the rounding differ.
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

TOKENS = 32_768  # maximum number of padded tokens in one forward pass
LARGE = 40_000_000  # base model parameters beyond which the maximum shrinks in proportion
MAX_NORM = 1.0  # of a gradient (L2), the Trainer's default

Request = TypeVar("Request", TrainRequest, ValidationRequest)
Row = tuple[list[int], list[int]]  # token ids and labels


@dataclass(frozen=True, slots=True)
class Job:
    """One adapter to train (``steps`` above 0) or to validate."""

    adapter: AdapterState
    data: Dataset
    steps: int = 0
    learning_rate: float = 0.0
    seed: int = 0


class StackedTrainer(AdapterTrainer):
    """Trains and validates many adapters at once on one base; parameters as of ``AdapterTrainer``."""

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
        self._logits_from_head = self._logits_are_head_of_states()

    def train(
        self, adapter: AdapterState, data: Dataset, steps: int, learning_rate: float, seed: int
    ) -> Trained:
        """Train one adapter; see ``AdapterTrainer.train``."""
        return self.train_all([Job(adapter, data, steps, learning_rate, seed)])[0]

    def loss(self, adapter: AdapterState, data: Dataset) -> tuple[float, int]:
        """Return one adapter's mean loss on ``data``; see ``AdapterTrainer.loss``."""
        return self.losses([Job(adapter, data)])[0]

    def train_all(self, jobs: Sequence[Job]) -> list[Trained]:
        """Train every job's adapter for its number of steps; return results in the jobs' order."""
        began = perf_counter()
        order = sorted(range(len(jobs)), key=lambda i: -jobs[i].steps)  # so that active adapters come first
        settings = self.settings
        batches = [_batches(jobs[i], settings.step_size) for i in order]
        sent = self._stack.matrix([jobs[i].adapter for i in order], self._base.device)
        weights = torch.nn.Parameter(sent.clone())
        # All adapters of a round share one learning rate.
        optimizer = torch.optim.AdamW(
            [weights],
            lr=jobs[0].learning_rate,
            weight_decay=settings.weight_decay,
            fused=weights.device.type == "cuda",
        )
        losses = torch.zeros(len(jobs), device=weights.device)
        done = torch.zeros_like(sent)
        torch.manual_seed(jobs[0].seed)  # for dropout
        self._stack.training = True
        with self._attached():
            for step in range(jobs[order[0]].steps):
                active = sum(jobs[i].steps > step for i in order)
                losses[:active] += self._step(weights, [next(batches[i]) for i in range(active)])
                if settings.proximal:
                    assert weights.grad is not None
                    weights.grad[:active] += settings.proximal * (weights.detach() - sent)[:active]
                _clip_gradients(weights)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                ending = [n for n in range(active) if jobs[order[n]].steps == step + 1]
                if ending:  # copy now: AdamW's momentum keeps changing weights that get no gradient
                    done[ending] = weights.detach()[ending]
        states = self._stack.states(done)
        mean = (losses.cpu() / torch.tensor([max(jobs[i].steps, 1) for i in order])).tolist()
        seconds = (perf_counter() - began) / len(jobs)
        results = {
            i: Trained(states[n], self._examples(len(jobs[i].data), jobs[i].steps), mean[n], seconds)
            for n, i in enumerate(order)
        }
        return [results[i] for i in range(len(jobs))]

    @torch.no_grad()
    def losses(self, jobs: Sequence[Job]) -> list[tuple[float, int]]:
        """Return each job's mean loss on its rows, nats per completion token, and the number of tokens."""
        weights = self._stack.matrix([job.adapter for job in jobs], self._base.device)
        rows = [_rows(job) for job in jobs]
        totals = torch.zeros(len(jobs), device=weights.device)
        counts = [sum(sum(t != IGNORED for t in labels[1:]) for _, labels in job_rows) for job_rows in rows]
        size = self.settings.step_size
        self._stack.training = False
        with self._attached():
            for start in range(0, max(map(len, rows)), size):
                unfinished = [i for i, job_rows in enumerate(rows) if len(job_rows) > start]
                batches = [rows[i][start : start + size] for i in unfinished]
                for part in self._chunks(batches):
                    picked = torch.tensor([unfinished[i] for i in part], device=weights.device)
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
        """Yield indices of batches in chunks of bounded size, batches of similar length together."""
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
        """Return each adapter's loss on its batch: (n,), the mean over answer tokens or the sum."""
        rows = max(map(len, batches))
        blank: tuple[list[int], list[int]] = [0], [IGNORED]
        filled = [row for batch in batches for row in [*batch, *([blank] * (rows - len(batch)))]]
        ids = pad_sequence([torch.tensor(row) for row, _ in filled], True)  # (n · rows, T)
        labels = pad_sequence([torch.tensor(row) for _, row in filled], True, IGNORED)[:, 1:]
        learned = (labels != IGNORED).flatten().nonzero().squeeze(1)  # positions of answer tokens
        owner = learned // (rows * labels.shape[1])  # index of each token's adapter
        targets = labels.flatten()[learned]
        device = weights.device
        ids, learned, owner, targets = (
            t.to(device, non_blocking=True) for t in (ids, learned, owner, targets)
        )
        self._stack.use(weights, self._base.dtype)
        # No mask is needed: padding follows each row, and a causal model does not look ahead.
        if self._logits_from_head:
            states = self._decoder(input_ids=ids, use_cache=False).last_hidden_state
            logits = self._head(states[:, :-1].flatten(0, 1)[learned])
        else:
            logits = self._base(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)[learned]
        each = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        total = torch.zeros(len(batches), device=device).index_add(0, owner, each)
        if not mean:
            return total
        return total / torch.bincount(owner, minlength=len(batches)).clamp(min=1)

    @torch.no_grad()
    def _logits_are_head_of_states(self) -> bool:
        """Return whether the logits are the output layer of the last hidden states, not scaled or capped."""
        ids = torch.arange(8, device=self._base.device)[None]
        with self._attached():
            whole = self._base(input_ids=ids, use_cache=False).logits
            from_states = self._head(self._decoder(input_ids=ids, use_cache=False).last_hidden_state)
        return bool(torch.equal(whole, from_states))

    @contextmanager
    def _attached(self) -> Iterator[None]:
        """Attach the stacked adapters to the base model in place of PEFT's."""
        self.model.disable_adapter_layers()
        self.model.eval()  # only affects dropout in the base; the stack has its own switch
        try:
            with self._stack.attached():
                yield
        finally:
            self.model.enable_adapter_layers()


class StackedFederation(LocalFederation):
    """Clients in this process whose adapters are trained in one batch."""

    def __init__(self, clients: Sequence[Client], trainer: StackedTrainer):
        super().__init__(clients, trainer)
        self._stacked = trainer

    def train(self, requests: Sequence[TrainRequest]) -> Iterator[TrainReply | TrainFailure]:
        """Have the named clients train, all in one batch."""
        return self._in_one_batch(requests, lambda r, trainer: self.clients[r.client].train(r, trainer))

    def validate(self, requests: Sequence[ValidationRequest]) -> Iterator[ValidationReply | TrainFailure]:
        """Have the named clients compute validation losses, all in one batch."""
        return self._in_one_batch(requests, lambda r, trainer: self.clients[r.client].validate(r, trainer))

    def _in_one_batch(
        self, requests: Sequence[Request], ask: Callable[[Request, Trainer], Any]
    ) -> Iterator[Any]:
        """Run each client in a thread until it needs the model; then run all their jobs in one batch."""
        queue = _JobQueue()
        trainer = _QueuingTrainer(self._stacked, queue)
        with ThreadPoolExecutor(max(len(requests), 1)) as pool:
            replies = [pool.submit(tried, request, trainer, ask) for request in requests]
            for reply in replies:
                reply.add_done_callback(lambda _: queue.notify())
            queue.wait(lambda: len(queue.jobs) + sum(r.done() for r in replies) >= len(replies))
            try:
                jobs = [job for job, _ in queue.jobs]
                if jobs:
                    run_jobs = self._stacked.train_all if jobs[0].steps else self._stacked.losses
                    for (_, future), result in zip(queue.jobs, run_jobs(jobs), strict=True):
                        future.set_result(result)
            except BaseException as error:
                for _, future in queue.jobs:
                    if not future.done():
                        future.set_exception(error)
                raise
            for reply in replies:
                yield reply.result()


class _JobQueue:
    """Collects the clients' jobs until all clients have queued one or failed."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Job, Future[Any]]] = []
        self._changed = Condition()

    def notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def put(self, job: Job) -> "Future[Any]":
        future: Future[Any] = Future()
        with self._changed:
            self.jobs.append((job, future))
            self._changed.notify_all()
        return future

    def wait(self, complete: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(complete)


class _QueuingTrainer(StandIn):
    """The trainer that clients are given: it queues their jobs and waits for the results."""

    def __init__(self, stacked: StackedTrainer, queue: _JobQueue):
        super().__init__(stacked)
        self._queue = queue

    def train(
        self, adapter: AdapterState, data: Dataset, steps: int, learning_rate: float, seed: int
    ) -> Trained:
        trained: Trained = self._queue.put(Job(adapter, data, steps, learning_rate, seed)).result()
        return trained

    def loss(self, adapter: AdapterState, data: Dataset) -> tuple[float, int]:
        loss, num_tokens = self._queue.put(Job(adapter, data)).result()
        return loss, num_tokens


def _batches(job: Job, size: int) -> Iterator[list[Row]]:
    """Yield batches of (ids, labels) without end, shuffled anew in each epoch."""
    rows = _rows(job)
    draw = np.random.default_rng(job.seed)
    while True:
        order = draw.permutation(len(rows))
        for start in range(0, len(rows), size):
            yield [rows[i] for i in order[start : start + size]]


def _rows(job: Job) -> list[Row]:
    columns: Any = job.data.to_dict()
    return list(zip(columns["input_ids"], columns["labels"], strict=True))


def _clip_gradients(weights: torch.nn.Parameter) -> None:
    """Clip each adapter's gradient to ``MAX_NORM``."""
    assert weights.grad is not None
    lengths = torch.linalg.vector_norm(weights.grad, dim=1, keepdim=True)
    weights.grad *= (MAX_NORM / (lengths + 1e-6)).clamp(max=1.0)
