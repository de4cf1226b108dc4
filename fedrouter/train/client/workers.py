"""Worker processes for training, each with its own base model on its own GPU or share of threads."""

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
    """An error in a worker, sent as text because not every exception can be pickled."""

    text: str
    memory: type[Exception] | None  # the exception type, if memory ran out


class StandIn:
    """Base of trainers that use ``main`` for tokenising but train elsewhere."""

    def __init__(self, main: AdapterTrainer):
        self._main = main

    @property
    def validation(self) -> float:
        """Share of a subset's rows that is held out for validation."""
        return self._main.validation

    @property
    def batch_size(self) -> int:
        """Rows per optimizer step."""
        return self._main.batch_size

    @property
    def trained(self) -> list[str]:
        """Names of the tensors that training changes."""
        return self._main.trained

    def tokenise(self, records: Sequence[Record]) -> "Dataset":
        """Tokenise records for the base model."""
        return self._main.tokenise(records)


class Worker(StandIn):
    """A trainer in another process, used like the one in this process.

    The process ends when its connection closes or this process ends, for whatever reason.

    Parameters
    ----------
    main : the trainer in this process, which tokenises for all.
    path : path of the base model.
    number : number of the process, from 1; also of its GPU.
    """

    def __init__(self, main: AdapterTrainer, config: Config, path: Path, number: int):
        super().__init__(main)
        spawning = multiprocessing.get_context("spawn")  # a fork would share CUDA and OpenMP state
        self._connection, child_end = spawning.Pipe()
        arguments = child_end, config, path, *device_and_dtype(config.base), torch.get_num_threads()
        self._process = spawning.Process(target=_work, args=arguments, daemon=True)
        with _only_gpu(number):
            self._process.start()
        child_end.close()

    def train(
        self, adapter: AdapterState, data: "Dataset", steps: int, learning_rate: float, seed: int
    ) -> Trained:
        """Train ``adapter`` on ``data`` in the worker; see ``AdapterTrainer.train``."""
        trained: Trained = self._call("train", adapter, data, steps, learning_rate, seed)
        return trained

    def loss(self, adapter: AdapterState, data: "Dataset") -> tuple[float, int]:
        """Return an adapter's mean loss on ``data``; see ``AdapterTrainer.loss``."""
        loss, num_tokens = self._call("loss", adapter, data)
        return loss, num_tokens

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            self._connection.send((method, arguments))
            result = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            raise WorkerError(
                f"a training process ended with code {self._process.exitcode}: out of memory, or see the "
                "error above; run the same command to resume after the last finished round, if necessary "
                "with fewer --processes"
            ) from error
        if isinstance(result, Failed):
            raise (result.memory or TrainingError)(result.text)
        return result


def start_workers(main: AdapterTrainer, config: Config, path: Path, processes: int) -> list[Worker]:
    """Start workers so that ``processes`` processes train, including this one."""
    return [Worker(main, config, path, number) for number in range(1, processes)]


@contextmanager
def _only_gpu(number: int) -> Iterator[None]:
    """Make only one GPU visible to a process started in this context: the Trainer uses the first it sees."""
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
    """Run in the worker process: execute calls until the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    model = load_base(path, dtype, device, config.base.quantization)
    tokenizer = load_tokenizer(path, config.base.chat_template, config.base.date)
    trainer = AdapterTrainer(model, tokenizer, config.lora, config.train, config.seed)
    try:
        while True:
            method, arguments = connection.recv()
            connection.send(_execute(trainer, method, arguments))
    except (EOFError, OSError):
        return


def _execute(trainer: AdapterTrainer, method: str, arguments: Sequence[Any]) -> Any:
    try:
        return getattr(trainer, method)(*arguments)
    except Exception as error:
        gpu = isinstance(error, torch.OutOfMemoryError)
        memory = (torch.OutOfMemoryError if gpu else MemoryError) if out_of_memory(error) else None
        return Failed(f"{type(error).__name__}: {first_line(error)}", memory)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
