"""Other processes that train beside this one, each with its own base model on its own GPU or threads."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedrouter.config import Config
from fedrouter.errors import TrainingError, WorkerError, first_line
from fedrouter.models import load_base, load_tokenizer
from fedrouter.train.client.sft import AdapterTrainer
from fedrouter.train.federation import Trained
from fedrouter.train.machine import device_and_dtype
from fedrouter.train.memory import out_of_memory
from fedrouter.types import AdapterState, Record

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, slots=True)
class Failed:
    """What went wrong in a worker; an exception itself may not survive the way."""

    text: str
    memory: type[Exception] | None  # which one, if memory ran out


class StandIn:
    """Prepares rows as the trainer ``here`` does; who inherits from it trains elsewhere or otherwise."""

    def __init__(self, here: AdapterTrainer):
        self._here = here

    @property
    def validation(self) -> float:
        """Share of a subset's rows that is not trained on."""
        return self._here.validation

    @property
    def batch_size(self) -> int:
        """Rows an optimizer step."""
        return self._here.batch_size

    @property
    def trained(self) -> list[str]:
        """Names of the tensors that training changes."""
        return self._here.trained

    def tokenise(self, records: Sequence[Record]) -> "Dataset":
        """Tokenise records for the base model."""
        return self._here.tokenise(records)


class Worker(StandIn):
    """A trainer in another process, used like the one in this process.

    It ends with the connection to it, and with this process, however that ends.

    Parameters
    ----------
    here : this process's trainer; it tokenises for all.
    path : of the base model.
    number : of the process, from 1; which GPU is its own.
    """

    def __init__(self, here: AdapterTrainer, config: Config, path: Path, number: int):
        super().__init__(here)
        spawning = multiprocessing.get_context("spawn")  # a fork would share what CUDA and OpenMP have open
        self._connection, there = spawning.Pipe()
        arguments = there, config, path, *device_and_dtype(config.base), torch.get_num_threads()
        self._process = spawning.Process(target=_work, args=arguments, daemon=True)
        with _only_gpu(number):
            self._process.start()
        there.close()

    def train(
        self, adapter: AdapterState, data: "Dataset", steps: int, learning_rate: float, seed: int
    ) -> Trained:
        """Train ``adapter`` on ``data`` there; see ``AdapterTrainer.train``."""
        trained: Trained = self._ask("train", adapter, data, steps, learning_rate, seed)
        return trained

    def loss(self, adapter: AdapterState, data: "Dataset") -> tuple[float, int]:
        """Return an adapter's mean loss on ``data``; see ``AdapterTrainer.loss``."""
        loss, num_tokens = self._ask("loss", adapter, data)
        return loss, num_tokens

    def _ask(self, what: str, *arguments: Any) -> Any:
        try:
            self._connection.send((what, arguments))
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            raise WorkerError(
                f"a training process ended with code {self._process.exitcode}: out of memory, or see above; "
                "the same command goes on from the last finished round, with fewer --processes if need be"
            ) from error
        if isinstance(answer, Failed):
            raise (answer.memory or TrainingError)(answer.text)
        return answer


def start_workers(here: AdapterTrainer, config: Config, path: Path, processes: int) -> list[Worker]:
    """Start what is missing to ``processes``, this one counted."""
    return [Worker(here, config, path, number) for number in range(1, processes)]


@contextmanager
def _only_gpu(number: int) -> Iterator[None]:
    """Let a process that starts meanwhile see one GPU alone: the Trainer takes the first that it sees."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = before.split(",") if before else []
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[number] if number < len(visible) else str(number)
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _work(connection: Connection, config: Config, path: Path, device: str, dtype: str, threads: int) -> None:
    """Answer until the connection ends; what a started process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    model = load_base(path, dtype, device, config.base.quantization)
    tokenizer = load_tokenizer(path, config.base.chat_template, config.base.date)
    trainer = AdapterTrainer(model, tokenizer, config.lora, config.train, config.seed)
    try:
        while True:
            what, arguments = connection.recv()
            connection.send(_answer(trainer, what, arguments))
    except (EOFError, OSError):
        return


def _answer(trainer: AdapterTrainer, what: str, arguments: Sequence[Any]) -> Any:
    try:
        return getattr(trainer, what)(*arguments)
    except Exception as error:
        gpu = isinstance(error, torch.OutOfMemoryError)
        memory = (torch.OutOfMemoryError if gpu else MemoryError) if out_of_memory(error) else None
        return Failed(f"{type(error).__name__}: {first_line(error)}", memory)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
