"""Run the rounds and write a checkpoint and metrics after each."""

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
from fedrouter.train.start import Reclusterer
from fedrouter.train.state import RunState, Start, exhausted


def train_rounds(
    session: Session, federation: Federation, start: Start, reclusterer: Reclusterer | None = None
) -> Start:
    """Run the remaining rounds; return the clustering and the state after the last one.

    Parameters
    ----------
    reclusterer : clusters the clients again every ``cluster.every`` rounds.

    Raises
    ------
    TrainingError
        If no client's update could be used in any round.
    """
    config, out = session.config, session.out
    every, last = config.cluster.every, config.train.rounds
    with Trackers(config, out, session.console) as trackers:
        while True:
            number = start.state.number
            if reclusterer and every and 0 < number < last and number % every == 0:
                start = reclusterer(start.clustering, start.state)
            until = last
            if reclusterer and every:
                until = min(last, (start.state.number // every + 1) * every)
            state = _stretch(session, federation, start, until, trackers)
            start = replace(start, state=state)
            if state.number >= last or exhausted(state, config.train.patience):
                break
    if exhausted(state, config.train.patience):
        session.say(
            f"stopped after round {state.number}: no validation loss fell in the last "
            f"{config.train.patience} rounds"
        )
    metrics = out / "metrics.jsonl"
    if not any(loss is not None for loss in state.losses) and not any_taken(metrics):
        raise TrainingError(
            f"no client's update could be used in any round; the field refused in {metrics} gives the reasons"
        )
    return start


def _stretch(
    session: Session, federation: Federation, start: Start, until: int, trackers: Trackers
) -> RunState:
    """Run the rounds before ``until`` with the same task clusters."""
    config, clustering, state = session.config, start.clustering, start.state
    train, out = config.train, session.out
    names = [*(c.name for c in clustering.clusters), "global"]  # "global": FedDPA's shared adapter
    metrics = Metrics(out / "metrics.jsonl", state.number)
    stored_clustering = clustering if config.cluster.every else None
    remaining_rounds = range(state.number, until)
    steps = sum(
        planned.steps
        for number in remaining_rounds
        for planned in plan(clustering.assignments, train, config.seed, number, config.cluster.every)
    )
    began = time.perf_counter()
    with TrainProgress(session.console, names, train.rounds, steps, state.number) as progress:
        for result in run_rounds(federation, clustering.assignments, state, config, progress.on_reply):
            state = result.state
            save_checkpoint(
                out / "checkpoints", state, start.digest, train.keep_checkpoints, stored_clustering
            )
            metrics.write(result, names, time.perf_counter() - began)
            trackers.write(result, names)
            progress.on_round(result)
            began = time.perf_counter()
            if state.number == until:
                break
    return state
