"""``--decision-log FILE``: decisions as JSON Lines, written by a thread of their own, rotated by size.

Requests wait for none of it: lines go through a bounded queue, and what does not fit, or cannot be written,
is counted. Texts of prompts are written with ``--log-prompts`` alone.
"""

import base64
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from fedrouter.errors import ServingError
from fedrouter.types import Array

KEPT = 9  # older files, FILE.1 the youngest
MAX_WAITING = 10_000  # lines
LINGER_S = 0.25  # a line waits for others
MAX_WRITE = 1 << 16  # characters written at once
ENCODE = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
logger = logging.getLogger("vllm.fedrouter.log")
Line = Callable[[], Mapping[str, Any]]  # made in the writing thread


@dataclass(frozen=True, slots=True)
class LogOptions:
    """Where decisions are kept, and how much of them.

    Raises
    ------
    ServingError
        If the size makes no sense.
    """

    path: Path
    prompts: bool = False
    # the texts that may decide as well
    vectors: bool = False
    # the vectors of those that were embedded as well
    max_mib: float = 64.0
    # of one file, then the next one is begun; KEPT older ones stay

    def __post_init__(self) -> None:
        if not self.max_mib > 0:
            raise ServingError(f"--decision-log-mib must be above 0, not {self.max_mib}")


class DecisionLog:
    """Appends lines to a file, in their order.

    Parameters
    ----------
    lost : called for each line that cannot be taken or written.

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
        self._most = min(MAX_WRITE, int(options.max_mib * 2**20) // 8)
        self._lines: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="fedrouter-log", daemon=True)
        self._thread.start()

    def write(self, line: Line) -> None:
        """Append what ``line`` returns; wait for nothing."""
        if self._lines.qsize() < MAX_WAITING:
            self._lines.put(line)
        else:
            self._lost()

    def close(self) -> None:
        """Write what waits, for a few seconds at most."""
        self._lines.put(None)
        self._thread.join(5)

    def _write(self) -> None:
        """Write what waits in one go: a line of its own costs as much as twenty."""
        ended = False
        while not ended:
            line, texts, size = self._lines.get(), list[str](), 0
            if self._lines.empty():
                time.sleep(LINGER_S)
            while line is not None:
                texts.append(ENCODE(line()))
                size += len(texts[-1])
                if size >= self._most or self._lines.empty():
                    break
                line = self._lines.get()
            ended = line is None
            if texts:
                self._file.handle(logging.makeLogRecord({"msg": "\n".join(texts), "num": len(texts)}))
        with suppress(OSError):  # what a full disk has not taken
            self._file.close()


class _Rotating(RotatingFileHandler):
    """Owner-readable files; a disk that is full costs lines, and is named once."""

    def __init__(self, options: LogOptions, lost: Callable[[], None]):
        self._failing, self._lost = False, lost
        super().__init__(
            options.path, maxBytes=int(options.max_mib * 2**20), backupCount=KEPT, encoding="utf-8"
        )

    def _open(self) -> TextIOWrapper:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        return os.fdopen(os.open(self.baseFilename, flags, 0o600), "a", encoding="utf-8")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        for _ in range(getattr(record, "num", 1)):
            self._lost()
        if not self._failing:
            logger.exception("decisions cannot be written to %s, and are lost", self.baseFilename)
        self._failing = True


def packed(vector: Array | None) -> str | None:
    """Return a vector as a line holds it: base64 of float16, little-endian."""
    return None if vector is None else base64.b64encode(vector.astype("<f2").tobytes()).decode("ascii")


def check_log(options: LogOptions) -> None:
    """Refuse a file that cannot be written.

    Raises
    ------
    ServingError
        If it cannot.
    """
    DecisionLog(options).close()
