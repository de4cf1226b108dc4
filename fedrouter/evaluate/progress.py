"""Progress of a long loop."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0


@contextmanager
def progress(console: Console | None, label: str, total: int) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each of ``total`` steps; silent without a console."""
    if console is None:
        yield lambda: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda: bar.advance(task)
    else:
        yield _Lines(console, label, total).advance


class _Lines:
    """One plain line every ``LINE_EVERY_S`` seconds, for logs and pipes."""

    def __init__(self, console: Console, label: str, total: int) -> None:
        self.console, self.label, self.total = console, label, total
        self.done = 0
        self.last_s = time.monotonic()

    def advance(self) -> None:
        self.done += 1
        if time.monotonic() - self.last_s >= LINE_EVERY_S:
            self.last_s = time.monotonic()
            self.console.print(f"{self.label}: {self.done}/{self.total}", markup=False, highlight=False)
