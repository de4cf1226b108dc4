"""Configuration → clients → task clusters → rounds → bundle; an interrupted run resumes where it stopped."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from fedrouter.builtin import is_builtin
from fedrouter.bundle import Bundle, load_bundle, write_bundle
from fedrouter.config import Config
from fedrouter.config_file import read_resolved
from fedrouter.errors import ClientError, TrainingError
from fedrouter.files import check_directory
from fedrouter.layout import number_of
from fedrouter.train import picture
from fedrouter.train.check import loaded
from fedrouter.train.client.client import Client
from fedrouter.train.disk.promises import keep_promises, noise_key
from fedrouter.train.federation import Federation
from fedrouter.train.local import LocalFederation, each
from fedrouter.train.memory import explained_out_of_memory
from fedrouter.train.rounds import train_rounds
from fedrouter.train.server.accountant import guarantees
from fedrouter.train.server.describe import doubt
from fedrouter.train.server.left_out import LeftOut
from fedrouter.train.server.methods import finish
from fedrouter.train.session import Session, versions
from fedrouter.train.side_by_side import StackedFederation, StackedTrainer
from fedrouter.train.start import cluster_anew, start
from fedrouter.types import Record, TaskCluster


@explained_out_of_memory()
def train(config: Config, out: Path, console: Console, processes: int = 1) -> Bundle:
    """Train a federation into ``out`` and return its bundle; resume a run that was interrupted there.

    The directory holds ``config.json`` (resolved), ``metrics.jsonl``, ``embeddings/``, ``checkpoints/`` and
    ``bundle/``; without noise also ``tsne.json``; with noise also ``privacy.json`` and the secret
    ``noise.key``; if clients failed before the rounds also ``left_out.json``.

    Parameters
    ----------
    processes : number of adapters trained at a time (workers.py).

    Raises
    ------
    TrainingError
        If ``out`` holds a run with another configuration, memory runs out, or no update could be used.
    """
    refuse_another_run(config, out)
    if (bundle := finished(out, console)) is not None:
        return bundle
    check_directory(out, "--out")
    session = Session(config, out, console, processes)
    found = loaded(config, session.say)
    for read in found.reads:
        if is_builtin(read.source):
            console.print(f"{read.source}: {len(read.records)} rows", highlight=False)
    console.print(
        f"{number_of(len(found.records), 'client')}, "
        f"{number_of(sum(map(len, found.records.values())), 'row')}",
        highlight=False,
    )
    session.load(found.rendered)
    secret = noise_key(out, config.privacy)
    with session.unclaimed():
        left_out = LeftOut(out, list(found.records), console, once=bool(config.privacy.centroid_noise))
        clients = admitted(session, found.records, left_out, secret)
        session.load_trainer([row for name in left_out.others for row in found.records[name]])
        return run(session, federation_of(session, clients), left_out, secret)


def federation_of(session: Session, clients: Sequence[Client]) -> LocalFederation:
    """Return a federation of clients in this process; with ``train.stacked`` they train in one batch."""
    if isinstance(session.trainer, StackedTrainer):
        return StackedFederation(clients, session.trainer)
    return LocalFederation(clients, session.trainer, session.workers)


def finished(out: Path, console: Console) -> Bundle | None:
    """Return the bundle if the run in ``out`` is finished, after a note to the user; else None."""
    if not (out / "bundle").exists():
        return None
    console.print(f"{out} is finished already; remove it or choose another --out to train again")
    return load_bundle(out / "bundle")


def admitted(
    session: Session, records: Mapping[str, Sequence[Record]], left_out: LeftOut, secret: bytes
) -> list[Client]:
    """Create the clients; leave out those whose embedding fails."""

    def admit(name: str) -> Client:
        return session.client(name, records[name], secret, partial(session.read_again, name))

    clients: list[Client] = []
    try:
        clients += each(left_out.others, admit)
    except ClientError as failed:
        left_out.add(failed)
    return clients


def run(session: Session, federation: Federation, left_out: LeftOut, secret: bytes) -> Bundle:
    """Find the task clusters, train the rounds and write the bundle."""
    config, out = session.config, session.out
    reclusterer = cluster_anew(session, federation, left_out)
    starting = left_out.without(federation, lambda: start(session, federation, reclusterer))
    left_out.resuming = False
    session.claim()
    clustering = starting.clustering
    for c in clustering.clusters:
        session.say(
            f"task cluster {c.name}: {number_of(c.num_examples, 'row')} of "
            f"{number_of(len(c.clients), 'client')}"
        )
    doubtful = doubt(config, [member.num_rows for member in federation.members()], len(clustering.clusters))
    if doubtful:
        session.say(doubtful)
    promised = guarantees(config, clustering.assignments)
    if promised:
        keep_promises(out, config.privacy, promised, secret)
    for guarantee in promised:
        session.say(f"privacy: {guarantee}")
    if any((out / "checkpoints").glob("round-*")):
        number = starting.state.number
        resumed = f"going on after round {number}"
        session.say(resumed if number else "the checkpoints belong to other rows; starting over")
    ended = train_rounds(session, federation, starting, reclusterer)
    clusters = ended.clustering.clusters
    finished_run = finish(config, ended.state, clusters, session.trainer.adapter_config)
    if isinstance(federation, LocalFederation) and not (
        config.privacy.centroid_noise or config.privacy.update_noise
    ):  # the server has no vectors of remote clients
        picture.draw(list(federation.clients.values()), [c.name for c in clusters], out, config.seed)
    return write_bundle(
        out / "bundle",
        base=session.base,
        embedder=session.embedder.spec,
        clusters=[with_loss(c, loss) for c, loss in zip(clusters, ended.state.losses, strict=False)],
        adapters=finished_run.adapters,
        adapter_config={**finished_run.adapter_config, "base_model_name_or_path": config.base.model},
        space=ended.clustering.space,
        probe_vectors=session.embedder.probe,
        fallback=config.routing.fallback,
        versions=versions(),
        chat_template=session.chat_template,
        generalist=finished_run.generalist,
        guarantees=promised,
        probes=session.probes,
    )


def refuse_another_run(config: Config, out: Path) -> None:
    """Check that ``out`` holds no run, or one with this configuration.

    Raises
    ------
    TrainingError, ConfigError
        If it holds a run with another configuration or a damaged one, or an unfinished ``fedrouter join``.
    """
    if (out / "joined.json").exists() and not (out / "bundle").exists():
        raise TrainingError(
            f"{out} holds an unfinished fedrouter join; run that command again, or choose another --out"
        )
    file = out / "config.json"
    if not file.exists():
        return
    old, new = (c.model_dump(mode="json", by_alias=True) for c in (read_resolved(file), config))
    changed = _changed(old, new)
    if changed:
        raise TrainingError(
            f"{out} holds a run with another configuration ({', '.join(changed)} differ); "
            "choose another --out, or resume the run with the same configuration"
        )


def with_loss(c: TaskCluster, loss: float | None) -> TaskCluster:
    """Record the loss of the last round in which the task cluster was trained."""
    return c if loss is None else replace(c, training={"loss": round(loss, 5)})


def _changed(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [c for k in keys for c in _changed(old.get(k), new.get(k), f"{prefix}.{k}" if prefix else k)]
    return [] if old == new else [prefix]
