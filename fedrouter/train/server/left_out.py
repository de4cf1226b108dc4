"""Clients that fail before the rounds, while they embed, cluster or tell: the run goes on without them.

The exchanges are then repeated among the others, so that nothing of the failed one is in the task clusters,
and ``left_out.json`` keeps it out for good: a resumed run finds the same task clusters.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from fedrouter.errors import ClientError, TrainingError
from fedrouter.files import write_atomically
from fedrouter.train.disk.metrics import read_left_out
from fedrouter.train.federation import Federation

Found = TypeVar("Found")


class LeftOut:
    """Who is left out of a run.

    Parameters
    ----------
    clients : names of all.
    once : nobody may be asked again: with noise on what is told before the rounds, which covers one answer.
    """

    def __init__(self, run: Path, clients: Collection[str], console: Console, once: bool):
        self._run, self._clients, self._console, self._once = run, clients, console, once
        self._reasons = read_left_out(run)
        self.resuming = any((run / "checkpoints").glob("round-*"))  # until the task clusters are found again
        self._say(self._reasons, "stays left out")

    @property
    def others(self) -> list[str]:
        """Names of the clients that take part."""
        return [name for name in self._clients if name not in self._reasons]

    def without(self, federation: Federation, find: Callable[[], Found]) -> Found:
        """Return what ``find`` returns, repeated without those who fail in it.

        Raises
        ------
        TrainingError
            If nobody is left, or the run cannot go on without them.
        """
        while True:
            try:
                return find()
            except ClientError as failed:
                if self._once:
                    raise TrainingError(
                        f"{failed}; privacy.centroid_noise covers one answer of the others, so they are not "
                        "asked again: choose another --out"
                    ) from failed
                self.add(failed)
                federation.leave(failed.reasons)

    def add(self, failed: ClientError) -> None:
        """Leave clients out from now on.

        Raises
        ------
        TrainingError
            If nobody is left, or a run is resumed that had them: its checkpoints would be of no use.
        """
        if self.resuming:
            raise TrainingError(
                f"{failed}; the checkpoints are of task clusters with its rows: give the command again "
                "once it works, or choose another --out"
            )
        self._reasons |= failed.reasons
        if not self.others:
            raise TrainingError(f"no client is left: {failed}")
        self._run.mkdir(parents=True, exist_ok=True)
        write_atomically(self._run / "left_out.json", json.dumps(self._reasons, indent=2) + "\n")
        self._say(failed.reasons, "is left out")

    def _say(self, reasons: Mapping[str, str], what: str) -> None:
        for client, reason in reasons.items():
            text = f"client {client} {what}: {reason}"
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)
