"""The rounds of a run, and what they leave on disk: checkpoints, metrics."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from fedrouter.config import Config
from fedrouter.errors import TrainingError
from fedrouter.train.checkpoint import save_checkpoint
from fedrouter.train.files import write_atomically
from fedrouter.train.left_out import read_left_out
from fedrouter.train.progress import TrainProgress
from fedrouter.train.recluster import Clustering
from fedrouter.train.server import Federation, RoundResult, RunState, exhausted, plan, run_rounds
from fedrouter.train.trackers import Trackers

Anew = Callable[[Clustering, RunState], tuple[Clustering, RunState, str]]


def train_rounds(
    federation: Federation,
    clustering: Clustering,
    state: RunState,
    digest: str,
    config: Config,
    out: Path,
    console: Console,
    anew: Anew | None = None,
) -> tuple[Clustering, RunState]:
    """Run the rounds that are left, with a checkpoint and metrics after each; return the last state.

    Parameters
    ----------
    digest : of the clustering; checkpoints belong to it.
    anew : clusters anew, every ``cluster.every`` rounds; returns the clustering, the state and the digest.

    Raises
    ------
    TrainingError
        If no client's update could be used in any round.
    """
    every, last = config.cluster.every, config.train.rounds
    with Trackers(config, out, console) as trackers:
        while True:
            if anew and every and 0 < state.number < last and state.number % every == 0:
                clustering, state, digest = anew(clustering, state)
            until = min(last, (state.number // every + 1) * every) if anew and every else last
            state = _stretch(federation, clustering, state, digest, config, until, out, console, trackers)
            if state.number >= last or exhausted(state, config.train.patience):
                break
    if exhausted(state, config.train.patience):
        console.print(
            f"stopped after round {state.number}: no validation loss fell any more", highlight=False
        )
    if not any(loss is not None for loss in state.losses) and not _any_taken(out / "metrics.jsonl"):
        raise TrainingError(
            f"no client's update could be used in any round; {out / 'metrics.jsonl'} says why, under refused"
        )
    return clustering, state


def _stretch(
    federation: Federation,
    clustering: Clustering,
    state: RunState,
    digest: str,
    config: Config,
    until: int,
    out: Path,
    console: Console,
    trackers: Trackers,
) -> RunState:
    """Run the rounds up to ``until`` with the same task clusters."""
    names = [*(c.name for c in clustering.clusters), "global"]  # the last: FedDPA's
    metrics = Metrics(out / "metrics.jsonl", state.number)
    kept = clustering if config.cluster.every else None
    steps = sum(n for r in range(state.number, until) for _, _, n in plan(clustering.assignments, config, r))
    began = time.perf_counter()
    with TrainProgress(console, names, config.train.rounds, steps, state.number) as progress:
        for result in run_rounds(federation, clustering.assignments, state, config, progress.on_reply):
            state = result.state
            save_checkpoint(out / "checkpoints", state, digest, config.train.keep_checkpoints, kept)
            metrics.write(result, names, time.perf_counter() - began)
            trackers.write(result, names)
            progress.on_round(result)
            began = time.perf_counter()
            if state.number == until:
                break
    return state


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


def _any_taken(metrics: Path) -> bool:
    """Tell whether an update was ever taken; with noise on updates losses do not say so."""
    return any(json.loads(line).get("num_clients") for line in metrics.read_text().splitlines())
