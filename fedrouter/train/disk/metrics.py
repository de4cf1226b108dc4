"""``metrics.jsonl`` and ``left_out.json``: metrics of the rounds, and the clients that are left out."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from fedrouter.files import read_json, read_json_lines, write_atomically
from fedrouter.train.state import RoundResult


def read_left_out(run: Path) -> dict[str, str]:
    """Return the clients left out of a run, and why: client → reason."""
    file = run / "left_out.json"
    return dict(read_json(file)) if file.exists() else {}


class Metrics:
    """``metrics.jsonl``: one line per round and task cluster.

    A resumed run first drops the lines of the rounds that it repeats. A line before the round lists the
    clients that were left out since the last such line.
    """

    def __init__(self, path: Path, start: int):
        self._path = path
        lines = read_json_lines(path, "round") if path.exists() else []
        kept = [line for line in lines if line["round"] < start]
        reported = {client for line in kept for client in line.get("left_out", ())}
        left_out = {c: reason for c, reason in read_left_out(path.parent).items() if c not in reported}
        if left_out:
            kept.append({"round": start, "left_out": left_out, "time": round(time.time(), 3)})
        write_atomically(path, "".join(f"{json.dumps(line)}\n" for line in kept))

    def write(self, result: RoundResult, names: Sequence[str], seconds: float) -> None:
        """Append the lines of one round, which took ``seconds``."""
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
    """Return whether any update was ever used; losses do not show it when updates are noisy."""
    return any(line.get("num_clients") for line in read_json_lines(metrics, "round"))
