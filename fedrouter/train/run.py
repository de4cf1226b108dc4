"""Configuration → clients → task clusters → rounds → bundle; an interrupted run goes on where it stopped."""

import importlib.metadata
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedrouter import __version__, data
from fedrouter.builtin import is_builtin
from fedrouter.bundle import Bundle, load_bundle, write_bundle
from fedrouter.config import Config
from fedrouter.embed import Embedder, HiddenStateEmbedder, embedder_spec, load_embedder, probe
from fedrouter.errors import DataError, TrainingError
from fedrouter.models import base_spec, load_base, load_tokenizer, read_chat_template, resolve_base
from fedrouter.partition import partition
from fedrouter.train.checkpoint import clustering_digest, latest_checkpoint, save_checkpoint
from fedrouter.train.client import Client
from fedrouter.train.cluster import rows_needed
from fedrouter.train.describe import describe
from fedrouter.train.local import LocalFederation
from fedrouter.train.memory import explained_out_of_memory
from fedrouter.train.methods import finish, group
from fedrouter.train.privacy import guarantees, keep_promises, noise_key
from fedrouter.train.progress import TrainProgress
from fedrouter.train.server import Federation, RoundResult, RunState, exhausted, plan, run_rounds
from fedrouter.train.sft import AdapterTrainer
from fedrouter.types import Assignment, Record, TaskCluster

RECORDED = ("torch", "transformers", "peft", "trl", "faiss-cpu", "scikit-learn", "numpy")


@explained_out_of_memory()
def train(config: Config, out: Path, console: Console) -> Bundle:
    """Train a federation into ``out`` and return its bundle; go on with a run that was interrupted there.

    The directory holds ``config.json`` (resolved), ``metrics.jsonl``, ``checkpoints/`` and ``bundle/``; with
    noise ``privacy.json`` and the secret ``noise.key`` as well.

    Raises
    ------
    TrainingError
        If ``out`` holds a run with another configuration, memory runs out, or no update could be used.
    """
    refuse_another_run(config, out)
    if (out / "bundle").exists():
        console.print(f"{out} is finished already; remove it or choose another --out to train again")
        return load_bundle(out / "bundle")

    records = load_clients(config)
    console.print(f"{len(records)} clients, {sum(map(len, records.values()))} rows", highlight=False)
    path = resolve_base(config.base.model, config.base.revision)
    tokenizer, model, dtype = load_model(config, path)
    base = base_spec(config.base.model, config.base.revision, path)

    wanted = config.embedder
    embedder: Embedder
    if wanted.model is None:
        spec = embedder_spec("base", base.model, wanted.max_tokens, dtype, wanted.layer, base.revision)
        embedder = HiddenStateEmbedder(model.base_model, tokenizer, spec)  # before adapters are put into it
    else:
        spec = embedder_spec(wanted.kind, wanted.model, wanted.max_tokens, "float32", wanted.layer)
        embedder = load_embedder(spec, base)
    key = noise_key(out, config.privacy)
    clients = [
        Client(name, rows, embedder, config.seed, config.privacy, key) for name, rows in records.items()
    ]
    probe_vectors = probe(embedder)

    trainer = AdapterTrainer(model, tokenizer, config.lora, config.train, config.seed)
    federation = LocalFederation(clients, trainer)
    grouping = group(federation, config, trainer.state())
    space, assignments = grouping.space, grouping.assignments
    clusters = describe(assignments, len(set(space.cluster_of)), config.routing, grouping.names)
    for c in clusters:
        console.print(
            f"task cluster {c.name}: {c.num_examples} rows of {len(c.clients)} clients", highlight=False
        )

    promised = guarantees(config, assignments)
    for guarantee in promised:
        console.print(f"privacy: {guarantee}", highlight=False, soft_wrap=True)

    claim(out, config)
    if promised:
        keep_promises(out, config.privacy, promised, key)
    digest = clustering_digest(space, assignments)
    resumed = latest_checkpoint(out / "checkpoints", digest)
    state = resumed or grouping.state
    if resumed:
        console.print(f"going on after round {state.number}", highlight=False)
    names = [*(c.name for c in clusters), "global"]  # the last: FedDPA's
    state = train_rounds(federation, assignments, state, config, out, digest, names, console)
    adapters, generalist, adapter_config = finish(config, state, clusters, trainer.adapter_config)
    return write_bundle(
        out / "bundle",
        base=base,
        embedder=spec,
        clusters=[_with_loss(c, loss) for c, loss in zip(clusters, state.losses, strict=False)],
        adapters=adapters,
        adapter_config={**adapter_config, "base_model_name_or_path": config.base.model},
        space=space,
        probe_vectors=probe_vectors,
        fallback=config.routing.fallback,
        versions=versions(),
        chat_template=read_chat_template(config.base.chat_template) if config.base.chat_template else None,
        generalist=generalist,
        guarantees=promised,
    )


def train_rounds(
    federation: Federation,
    assignments: Sequence[Assignment],
    state: RunState,
    config: Config,
    out: Path,
    digest: str,
    names: Sequence[str],
    console: Console,
) -> RunState:
    """Run the rounds that are left, with a checkpoint and metrics after each; return the last state.

    Raises
    ------
    TrainingError
        If no client's update could be used in any round.
    """
    metrics = Metrics(out / "metrics.jsonl", state.number)
    rounds = range(state.number, config.train.rounds)
    steps = sum(n for number in rounds for _, _, n in plan(assignments, config, number))
    with TrainProgress(console, names, config.train.rounds, steps, state.number) as progress:
        for result in run_rounds(federation, assignments, state, config, progress.on_reply):
            state = result.state
            save_checkpoint(out / "checkpoints", state, digest, config.train.keep_checkpoints)
            metrics.write(result, names)
            progress.on_round(result)
    if exhausted(state, config.train.patience):
        console.print(
            f"stopped after round {state.number}: no validation loss fell any more", highlight=False
        )
    if not metrics.num_updates and not any(loss is not None for loss in state.losses):
        raise TrainingError(
            f"no client's update could be used in any round; {out / 'metrics.jsonl'} says why, under refused"
        )
    return state


def load_model(config: Config, path: Path) -> tuple[Any, Any, str]:
    """Return tokenizer, base model and dtype as the configuration says.

    Raises
    ------
    TrainingError, ModelError
        If there is no such device, or the model does not load.
    """
    tokenizer = load_tokenizer(path, config.base.chat_template)
    device = _device(config.base.device)
    dtype = _dtype(config.base.dtype, device)
    return tokenizer, load_base(path, dtype, device), dtype


def versions() -> dict[str, str]:
    """Return what a bundle records of the libraries that wrote it."""
    return {"fedrouter": __version__, **{name: importlib.metadata.version(name) for name in RECORDED}}


def load_clients(config: Config) -> dict[str, list[Record]]:
    """Return each client's records, as the configuration deals them out."""
    settings = config.data
    if settings.clients:
        return load_sources(settings.clients, config, settings.max_per_client)
    sources = [settings.source] if isinstance(settings.source, str) else settings.source
    records: list[Record] = []
    for source in sources:
        if is_builtin(source):
            records += data.builtin_records(source, settings.split, settings.num_per_task, config.seed)
        else:
            records += data.load_records(source, settings.split)
    return partition(
        records,
        settings.partition,
        settings.num_clients,
        config.seed,
        settings.alpha,
        max_per_client=settings.max_per_client,
    )


def load_sources(
    sources: Mapping[str, str], config: Config, limit: int | None = None
) -> dict[str, list[Record]]:
    """Return the records of clients that have a source each, sorted by name.

    Raises
    ------
    DataError
        If a client has too few for ``privacy.min_cluster_size``.
    """
    records = {
        n: data.load_records(source, config.data.split, limit) for n, source in sorted(sources.items())
    }
    needed = rows_needed(config.privacy.min_cluster_size)
    for name, rows in records.items():
        if len(rows) < needed:
            raise DataError(
                f"client {name}: {len(rows)} row{'s' * (len(rows) > 1)} in {sources[name]}; with "
                f"privacy.min_cluster_size = {config.privacy.min_cluster_size} it needs at least {needed}"
            )
    return records


class Metrics:
    """``metrics.jsonl``: one line a round and task cluster; a resumed run drops what it will write again."""

    def __init__(self, path: Path, start: int):
        self._path = path
        kept = []
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["round"] < start]
        self.num_updates = sum(json.loads(line)["num_clients"] for line in kept)  # that were taken
        write_atomically(path, "".join(f"{line}\n" for line in kept))

    def write(self, result: RoundResult, names: Sequence[str]) -> None:
        """Append one round."""
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
                    "time": round(time.time(), 3),
                }
                file.write(json.dumps(line) + "\n")
                self.num_updates += c.num_clients


def refuse_another_run(config: Config, out: Path) -> None:
    """Check that ``out`` holds nothing, or a run with this configuration.

    Raises
    ------
    TrainingError
        If it holds something else.
    """
    if (out / "joined.json").exists() and not (out / "bundle").exists():
        raise TrainingError(
            f"{out} holds an unfinished fedrouter join; give that command again, or another --out"
        )
    file = out / "config.json"
    if not file.exists():
        return
    changed = _changed(json.loads(file.read_text(encoding="utf-8")), config.model_dump(by_alias=True))
    if changed:
        raise TrainingError(
            f"{out} holds a run with another configuration ({', '.join(changed)} differ); "
            "choose another --out, or give the same configuration to go on"
        )


def claim(out: Path, config: Config) -> None:
    """Write the resolved configuration beside the run; not before all that can be refused was."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "config.json", json.dumps(config.model_dump(by_alias=True), indent=2) + "\n")


def _changed(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [c for k in keys for c in _changed(old.get(k), new.get(k), f"{prefix}.{k}" if prefix else k)]
    return [] if old == new else [prefix]


def write_atomically(path: Path, text: str) -> None:
    """Write under a temporary name, then rename."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _with_loss(c: TaskCluster, loss: float | None) -> TaskCluster:
    return c if loss is None else replace(c, training={"loss": round(loss, 5)})


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError('base.device = "cuda": this machine has no usable GPU; set "cpu" or "auto"')
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _dtype(name: str, device: str) -> str:
    return ("bfloat16" if device == "cuda" else "float32") if name == "auto" else name
