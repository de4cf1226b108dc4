"""The audit file of a site: one line per message sent or received, and the totals of the day."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from fedrouter.errors import DataError
from fedrouter.files import read_json_lines, reading


class Audit:
    """``audit.jsonl``: time, way, kinds, bytes, SHA-256 and exchange of each message; reason of a refusal.

    A line is written before its message is sent, so a line that a crash cut off is of no message.

    Parameters
    ----------
    file : append-only; after a restart the day's totals are read from it.

    Raises
    ------
    DataError
        If the file cannot be opened, or is damaged; names the line.
    """

    def __init__(self, file: Path):
        self._file = file
        self._day, self.num_requests, self.num_bytes = "", 0, 0
        self._start_new_day()
        with reading(file):
            file.open("a").close()  # a file that cannot be written must not be found at the first message
            _drop_cut_line(file)
        for number, entry in enumerate(read_json_lines(file, "time", "way", "bytes"), start=1):
            if [type(entry[key]) for key in ("time", "way", "bytes")] != [str, str, int]:
                raise DataError(
                    f"{file}:{number}: damaged: time, way or bytes is of the wrong type; remove the line"
                )
            self._count(entry)

    def write(self, way: str, kinds: list[str], body: bytes, asked: str, reason: str = "") -> None:
        """Append one message.

        Parameters
        ----------
        way : "in" or "out".
        asked : run and number of the exchange.
        reason : why the site refused or failed, if it did.
        """
        self._start_new_day()
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "way": way,
            "kinds": kinds,
            "bytes": len(body),
            "sha256": hashlib.sha256(body).hexdigest(),
            "asked": asked,
            **({"reason": reason} if reason else {}),
        }
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._count(entry)

    def _start_new_day(self) -> None:
        day = time.strftime("%Y-%m-%d", time.gmtime())
        if day != self._day:
            self._day, self.num_requests, self.num_bytes = day, 0, 0

    def _count(self, entry: dict[str, Any]) -> None:
        if entry["time"].startswith(self._day):
            self.num_requests += entry["way"] == "in"
            self.num_bytes += entry["bytes"] if entry["way"] == "out" else 0


def _drop_cut_line(file: Path) -> None:
    content = file.read_bytes()
    if not content.endswith(b"\n"):
        os.truncate(file, content.rfind(b"\n") + 1)
