"""``metrics.jsonl`` and ``left_out.json``: what a run tells of its rounds and of clients that are gone."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from fedrouter.files import write_atomically
from fedrouter.train.state import RoundResult


def read_left_out(run: Path) -> dict[str, str]:
    """Return who is left out of a run, and why."""
    file = run / "left_out.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


class Metrics:
    """``metrics.jsonl``: one line a round and task cluster; a resumed run drops what it will write again.

    Clients that were left out since the last line have one line before the round.
    """

    def __init__(self, path: Path, start: int):
        self._path = path
        kept = []
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["round"] < start]
        told = {client for line in kept for client in json.loads(line).get("left_out", ())}
        left_out = {c: reason for c, reason in read_left_out(path.parent).items() if c not in told}
        if left_out:
            line = {"round": start, "left_out": left_out, "time": round(time.time(), 3)}
            kept.append(json.dumps(line))
        write_atomically(path, "".join(f"{line}\n" for line in kept))

    def write(self, result: RoundResult, names: Sequence[str], seconds: float) -> None:
        """Append one round, and how long all of it took."""
        with self._path.open("a", encoding="utf-8") as file:
            for c in result.clusters:
                line = {
                    "round": result.number,
                    "cluster": names[c.cluster],
                    "loss": None if c.loss is None else round(c.loss, 5),
                    "num_examples": c.num_examples,
                    "num_clients": c.num_clients,
                    "drift": round(c.drift, 5),
                    "norm": round(c.norm, 5),
                    **({} if c.validation is None else {"validation": round(c.validation, 5)}),
                    **({} if c.residual is None else {"residual": round(c.residual, 7)}),
                    **({"refused": dict(c.refused)} if c.refused else {}),
                    "num_bytes": c.num_bytes,
                    "seconds": round(seconds, 3),
                    "time": round(time.time(), 3),
                }
                file.write(json.dumps(line) + "\n")


def any_taken(metrics: Path) -> bool:
    """Tell whether an update was ever taken; with noise on updates losses do not say so."""
    return any(json.loads(line).get("num_clients") for line in metrics.read_text().splitlines())
