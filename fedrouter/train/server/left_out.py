"""Leave out clients that fail before the rounds, so that the run can continue without them.

The exchanges are repeated with the remaining clients, so the task clusters contain nothing of a failed
client. ``left_out.json`` excludes it for good: a resumed run must find the same task clusters.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from fedrouter.errors import ClientError, TrainingError
from fedrouter.files import write_atomically
from fedrouter.layout import print_line
from fedrouter.train.disk.metrics import read_left_out
from fedrouter.train.federation import Federation

Found = TypeVar("Found")


class LeftOut:
    """The clients that are left out of a run.

    Parameters
    ----------
    clients : names of all clients.
    once : whether exchanges must not be repeated, because ``privacy.centroid_noise`` covers one reply only.
    """

    def __init__(self, run: Path, clients: Collection[str], console: Console, once: bool):
        self._run, self._clients, self._console, self._once = run, clients, console, once
        self._reasons = read_left_out(run)
        self.resuming = any((run / "checkpoints").glob("round-*"))  # False once task clusters are found
        self._say(self._reasons, "stays left out")

    @property
    def others(self) -> list[str]:
        """Names of the clients that take part."""
        return [name for name in self._clients if name not in self._reasons]

    def without(self, federation: Federation, find: Callable[[], Found]) -> Found:
        """Return the result of ``find``, repeated without the clients that fail in it.

        Raises
        ------
        TrainingError
            If no client is left, or the run cannot continue without the failed clients.
        """
        while True:
            try:
                return find()
            except ClientError as failed:
                if self._once:
                    raise TrainingError(
                        f"{failed}; privacy.centroid_noise covers only one reply of each client, so the "
                        "others cannot be asked again: choose another --out"
                    ) from failed
                self.add(failed)
                federation.leave(failed.reasons)

    def add(self, failed: ClientError) -> None:
        """Leave the failed clients out from now on.

        Raises
        ------
        TrainingError
            If no client is left, or the run is resumed from checkpoints that include these clients.
        """
        if self.resuming:
            raise TrainingError(
                f"{failed}; the checkpoints belong to task clusters with its rows: run the command again "
                "once it works, or choose another --out"
            )
        self._reasons |= failed.reasons
        if not self.others:
            raise TrainingError(f"no client is left: {failed}")
        self._run.mkdir(parents=True, exist_ok=True)
        write_atomically(self._run / "left_out.json", json.dumps(self._reasons, indent=2) + "\n")
        self._say(failed.reasons, "is left out")

    def _say(self, reasons: Mapping[str, str], status: str) -> None:
        for client, reason in reasons.items():
            text = f"client {client} {status}: {reason}"
            print_line(self._console, text)
