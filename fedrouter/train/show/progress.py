"""Progress of a run: a live bar on a terminal, plain lines otherwise."""

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fedrouter.layout import print_line
from fedrouter.train.state import RoundResult
from fedrouter.types import TrainFailure, TrainReply


class TrainProgress:
    """Shows rounds, clients, loss, examples per second and the time left."""

    def __init__(self, console: Console, names: Sequence[str], rounds: int, steps: int, start: int):
        self._console = console
        self._names = names
        self._rounds = rounds
        self._bar = Progress(
            TextColumn("round {task.fields[round]}/" + str(rounds)),
            BarColumn(),
            TextColumn(
                "{task.percentage:>3.0f} %  {task.fields[client]}  {task.fields[rate]:.0f} examples/s",
                markup=False,
            ),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, round=start + 1, client="", rate=0.0)
        self._start, self._began = start, time.perf_counter()
        self._examples = 0

    def __enter__(self) -> "TrainProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def on_reply(self, reply: TrainReply | TrainFailure, steps: int) -> None:
        """Count a client's reply or failure."""
        client = f"{reply.client} {self._names[reply.cluster]}"
        if isinstance(reply, TrainReply):
            self._examples += reply.num_examples
            client += "" if reply.loss is None else f" loss {reply.loss:.3f}"
        self._bar.update(self._task, advance=steps, client=client, rate=self._rate())

    def on_round(self, result: RoundResult) -> None:
        """Print a line on a finished round, and one on each client whose update was not used."""
        seconds = time.perf_counter() - self._began
        left = seconds / (result.number + 1 - self._start) * (self._rounds - result.number - 1)
        losses = "  ".join(
            f"{self._names[c.cluster]} {'-' if c.loss is None else f'{c.loss:.3f}'}" for c in result.clusters
        )
        print_line(
            self._console,
            f"round {result.number + 1}/{self._rounds}  loss: {losses}  "
            f"{self._rate():.0f} examples/s  {left:.0f} s left",
        )
        for c in result.clusters:
            where = f"round {result.number + 1}, {self._names[c.cluster]}"
            for client, reason in c.refused.items():
                text = f"{where}: nothing from client {client} was used: {reason}"
                print_line(self._console, text)
        self._bar.update(self._task, round=min(result.number + 2, self._rounds))

    def _rate(self) -> float:
        return self._examples / max(time.perf_counter() - self._began, 1e-9)
