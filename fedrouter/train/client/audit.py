"""What a site has sent and received: one line a message, and how much that is today."""

import hashlib
import json
import os
import time
from pathlib import Path


class Audit:
    """``audit.jsonl``: time, way, kinds, bytes, SHA-256 and what asked, appended before anything is sent.

    Parameters
    ----------
    file : lines are only ever added; the counts of the day go on after a restart.
    """

    def __init__(self, file: Path):
        self._file = file
        self._day, self.num_requests, self.num_bytes = "", 0, 0
        self._roll()
        if file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                self._count(json.loads(line))

    def write(self, way: str, kinds: list[str], body: bytes, asked: str) -> None:
        """Write down one message.

        Parameters
        ----------
        way : "in" or "out".
        asked : run and number of the exchange.
        """
        self._roll()
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "way": way,
            "kinds": kinds,
            "bytes": len(body),
            "sha256": hashlib.sha256(body).hexdigest(),
            "asked": asked,
        }
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._count(entry)

    def _roll(self) -> None:
        day = time.strftime("%Y-%m-%d", time.gmtime())
        if day != self._day:
            self._day, self.num_requests, self.num_bytes = day, 0, 0

    def _count(self, entry: dict[str, object]) -> None:
        if str(entry["time"]).startswith(self._day):
            self.num_requests += entry["way"] == "in"
            size = entry["bytes"]
            assert isinstance(size, int)
            self.num_bytes += size if entry["way"] == "out" else 0
