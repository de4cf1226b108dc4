"""The rounds of a run, and what they leave on disk: checkpoints, metrics."""

import time
from dataclasses import replace

from fedrouter.errors import TrainingError
from fedrouter.train.disk.checkpoint import save_checkpoint
from fedrouter.train.disk.metrics import Metrics, any_taken
from fedrouter.train.federation import Federation
from fedrouter.train.server.loop import plan, run_rounds
from fedrouter.train.session import Session
from fedrouter.train.show.progress import TrainProgress
from fedrouter.train.show.trackers import Trackers
from fedrouter.train.start import Anew
from fedrouter.train.state import RunState, Start, exhausted


def train_rounds(session: Session, federation: Federation, begun: Start, anew: Anew | None = None) -> Start:
    """Run the rounds that are left, with a checkpoint and metrics after each; return where they end.

    Parameters
    ----------
    anew : clusters anew, every ``cluster.every`` rounds.

    Raises
    ------
    TrainingError
        If no client's update could be used in any round.
    """
    config, out = session.config, session.out
    every, last = config.cluster.every, config.train.rounds
    with Trackers(config, out, session.console) as trackers:
        while True:
            number = begun.state.number
            if anew and every and 0 < number < last and number % every == 0:
                begun = anew(begun.clustering, begun.state)
            until = min(last, (begun.state.number // every + 1) * every) if anew and every else last
            state = _stretch(session, federation, begun, until, trackers)
            begun = replace(begun, state=state)
            if state.number >= last or exhausted(state, config.train.patience):
                break
    if exhausted(state, config.train.patience):
        session.say(f"stopped after round {state.number}: no validation loss fell any more")
    metrics = out / "metrics.jsonl"
    if not any(loss is not None for loss in state.losses) and not any_taken(metrics):
        raise TrainingError(
            f"no client's update could be used in any round; {metrics} says why, under refused"
        )
    return begun


def _stretch(
    session: Session, federation: Federation, begun: Start, until: int, trackers: Trackers
) -> RunState:
    """Run the rounds up to ``until`` with the same task clusters."""
    config, clustering, state = session.config, begun.clustering, begun.state
    train, out = config.train, session.out
    names = [*(c.name for c in clustering.clusters), "global"]  # the last: FedDPA's
    metrics = Metrics(out / "metrics.jsonl", state.number)
    kept = clustering if config.cluster.every else None
    ahead = range(state.number, until)
    steps = sum(one.steps for r in ahead for one in plan(clustering.assignments, train, config.seed, r))
    began = time.perf_counter()
    with TrainProgress(session.console, names, train.rounds, steps, state.number) as progress:
        for result in run_rounds(federation, clustering.assignments, state, config, progress.on_reply):
            state = result.state
            save_checkpoint(out / "checkpoints", state, begun.digest, train.keep_checkpoints, kept)
            metrics.write(result, names, time.perf_counter() - began)
            trackers.write(result, names)
            progress.on_round(result)
            began = time.perf_counter()
            if state.number == until:
                break
    return state
