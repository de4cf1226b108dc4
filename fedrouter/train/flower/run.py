"""``fedrouter train --federation``: train with the clients of a federation's directory."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fedrouter.bundle import Bundle
from fedrouter.config_file import load_config
from fedrouter.files import write_atomically
from fedrouter.train.federate import train_remote
from fedrouter.train.flower.federation import load_directory, nodes
from fedrouter.train.flower.status import SEEN
from fedrouter.train.flower.transport import connected
from fedrouter.train.run import finished, refuse_another_run


def train_over_flower(
    config: Path | None, overrides: Sequence[str], out: Path, federation: Path, console: Console
) -> Bundle:
    """Train with the clients of a federation; its superlink must be running.

    Raises
    ------
    ConfigError
        If the directory, the roster or the settings are invalid, or the superlink does not answer.
    TrainingError
        As in ``train_remote``.
    """
    directory = load_directory(federation)
    roster, settings = directory.roster(), directory.settings
    resolved = load_config(config, overrides, clients=list(roster))
    refuse_another_run(resolved, out)
    if (bundle := finished(out, console)) is not None:
        return bundle
    seen: dict[str, dict[str, object]] = {}

    def on_answer(client: str, rows: int, what: str) -> None:
        when = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime())
        seen[client] = {"rows": rows, "time": when, "what": what}
        write_atomically(federation / SEEN, json.dumps(seen))

    nodes(directory, change=True)
    with connected(directory) as transport:
        return train_remote(
            resolved,
            out,
            console,
            transport,
            roster,
            directory.waiting,
            half=settings.float16,
            secure=settings.secure_sum,
            on_answer=on_answer,
        )
