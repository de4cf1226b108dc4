"""``--decision-log FILE``: routing decisions as JSON Lines, rotated by size.

A separate thread writes, so that prompts never wait: lines go through a bounded queue, and lines that do not
fit or cannot be written are counted. Prompts are written only with ``--log-prompts``.
"""

import base64
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from fedrouter.errors import ServingError, first_line
from fedrouter.types import Array

NUM_OLD = 9  # rotated files, FILE.1 the newest
MAX_QUEUE = 10_000  # lines
LINGER_S = 0.25  # wait after a line, so that several are written together
MAX_WRITE = 1 << 16  # characters in one write
ENCODE = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
logger = logging.getLogger("vllm.fedrouter.log")
Line = Callable[[], Mapping[str, Any]]  # called in the writing thread


@dataclass(frozen=True, slots=True)
class LogOptions:
    """Where decisions are logged, and with how much detail.

    Raises
    ------
    ServingError
        If ``max_mib`` is not positive.
    """

    path: Path
    prompts: bool = False
    # log the prompts' texts too
    vectors: bool = False
    # log the prompts' embeddings too
    max_mib: float = 64.0
    # size at which the file is rotated

    def __post_init__(self) -> None:
        if not self.max_mib > 0:
            raise ServingError(f"--decision-log-mib must be above 0, not {self.max_mib}")


class DecisionLog:
    """Appends lines to a file, in order.

    Parameters
    ----------
    lost : called for each line that is dropped.

    Raises
    ------
    ServingError
        If the file cannot be written.
    """

    def __init__(self, options: LogOptions, lost: Callable[[], None] = lambda: None):
        self.options, self._lost = options, lost
        try:
            self._file = _Rotating(options, lost)
        except OSError as error:
            raise ServingError(
                f"--decision-log {options.path}: cannot be written: {error.strerror}; choose another file"
            ) from error
        self._max_write = min(MAX_WRITE, int(options.max_mib * 2**20) // 8)
        self._lines: queue.SimpleQueue[tuple[Line, Future[bool] | None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="fedrouter-log", daemon=True)
        self._thread.start()

    def write(self, line: Line, written: Future[bool] | None = None) -> None:
        """Queue what ``line`` returns, without waiting.

        Parameters
        ----------
        written : running future that is told whether the file took the line.
        """
        if self._lines.qsize() < MAX_QUEUE:
            self._lines.put((line, written))
        else:
            self._lost()
            if written is not None:
                written.set_result(False)

    def close(self) -> None:
        """Write the queued lines, for five seconds at most."""
        self._lines.put(None)
        self._thread.join(5)

    def _write(self) -> None:
        """Write queued lines together: one write costs as much as 20 lines."""
        ended = False
        while not ended:
            queued, texts, size = self._lines.get(), list[str](), 0
            waiting: list[Future[bool]] = []
            if self._lines.empty():
                time.sleep(LINGER_S)
            while queued is not None:
                line, written = queued
                texts.append(ENCODE(line()))
                if written is not None:
                    waiting.append(written)
                size += len(texts[-1])
                if size >= self._max_write or self._lines.empty():
                    break
                queued = self._lines.get()
            ended = queued is None
            taken = self._file.takes(texts)
            for written in waiting:
                written.set_result(taken)
        with suppress(OSError):  # a full disk
            self._file.close()


class _Rotating(RotatingFileHandler):
    """Files that only their owner can read; failed writes lose lines, and the first of them is reported."""

    def __init__(self, options: LogOptions, lost: Callable[[], None]):
        self._failed, self._reported, self._lost = False, False, lost
        super().__init__(
            options.path, maxBytes=int(options.max_mib * 2**20), backupCount=NUM_OLD, encoding="utf-8"
        )

    def _open(self) -> TextIOWrapper:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        return os.fdopen(os.open(self.baseFilename, flags, 0o600), "a", encoding="utf-8")

    def takes(self, lines: Sequence[str]) -> bool:
        """Write lines; return whether that succeeded."""
        self._failed = False
        if lines:
            self.handle(logging.makeLogRecord({"msg": "\n".join(lines), "num": len(lines)}))
            self._reported = self._failed  # a later failure, after a success, is reported again
        return not self._failed

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - overrides logging's
        for _ in range(getattr(record, "num", 1)):
            self._lost()
        if not self._reported:
            problem = sys.exception()
            reason = getattr(problem, "strerror", None) or (first_line(problem) if problem else "unknown")
            logger.error("decisions cannot be written to %s and are lost: %s", self.baseFilename, reason)
        self._failed = True


def packed(vector: Array | None) -> str | None:
    """Return a vector as base64 of little-endian float16, as in the log."""
    return None if vector is None else base64.b64encode(vector.astype("<f2").tobytes()).decode("ascii")


def check_log(options: LogOptions) -> None:
    """Raise ``ServingError`` if the log file cannot be written."""
    DecisionLog(options).close()
