"""Configuration → clients → task clusters → rounds → bundle; an interrupted run goes on where it stopped."""

import gc
import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedrouter import __version__
from fedrouter.bundle import Bundle, load_bundle, read_probes, write_bundle
from fedrouter.config import Config
from fedrouter.embed import Embedder, HiddenStateEmbedder, chosen, embedder_spec, load_embedder
from fedrouter.errors import ClientError, FedRouterError, TrainingError
from fedrouter.models import base_spec, load_base
from fedrouter.train import picture
from fedrouter.train.cache import CachedEmbedder
from fedrouter.train.check import loaded
from fedrouter.train.client import Client
from fedrouter.train.describe import doubt
from fedrouter.train.files import write_atomically
from fedrouter.train.left_out import LeftOut
from fedrouter.train.local import LocalFederation, each
from fedrouter.train.machine import device_and_dtype, share_out
from fedrouter.train.memory import explained_out_of_memory
from fedrouter.train.methods import finish
from fedrouter.train.privacy import guarantees, keep_promises, noise_key
from fedrouter.train.rounds import train_rounds
from fedrouter.train.sft import AdapterTrainer
from fedrouter.train.start import rereading, start
from fedrouter.train.targets import check_targets
from fedrouter.train.targets import left_out as left_out_of
from fedrouter.train.workers import start_workers
from fedrouter.types import TaskCluster

RECORDED = ("torch", "transformers", "peft", "trl", "faiss-cpu", "scikit-learn", "numpy")


@contextmanager
def unclaimed(out: Path) -> Iterator[None]:
    """Remove a new directory again where input is refused before it has become a run."""
    new = not out.exists()
    try:
        yield
    except FedRouterError:
        if new and not (out / "config.json").exists():
            shutil.rmtree(out, ignore_errors=True)  # embeddings
        raise


@explained_out_of_memory()
def train(config: Config, out: Path, console: Console, processes: int = 1) -> Bundle:
    """Train a federation into ``out`` and return its bundle; go on with a run that was interrupted there.

    The directory holds ``config.json`` (resolved), ``metrics.jsonl``, ``embeddings/``, ``checkpoints/`` and
    ``bundle/``; without noise ``tsne.json``, with noise ``privacy.json`` and the secret ``noise.key``;
    ``left_out.json`` where clients failed before the rounds.

    Parameters
    ----------
    processes : train so many adapters at a time (workers.py).

    Raises
    ------
    TrainingError
        If ``out`` holds a run with another configuration, memory runs out, or no update could be used.
    """
    refuse_another_run(config, out)
    if (out / "bundle").exists():
        console.print(f"{out} is finished already; remove it or choose another --out to train again")
        return load_bundle(out / "bundle")

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    probes = None if config.routing.probes is None else read_probes(Path(config.routing.probes))
    input_ = loaded(config, say)
    records, path, tokenizer = input_.records, input_.path, input_.tokenizer
    console.print(f"{len(records)} clients, {sum(map(len, records.values()))} rows", highlight=False)
    model, dtype = load_model(config, path, processes)
    for line in left_out_of(model):
        say(line)
    base = base_spec(config.base.model, config.base.revision, path)

    wanted, why = chosen(config.embedder, path)
    if why:
        say(why)
    found: Embedder
    if wanted.model is None:
        spec = embedder_spec(
            "base", base.model, wanted.max_tokens, dtype, wanted.layer, base.revision, pooling=wanted.pooling
        )
        found = HiddenStateEmbedder(model.base_model, tokenizer, spec)  # before adapters are put into it
    else:
        spec = embedder_spec(
            wanted.kind,
            wanted.model,
            wanted.max_tokens,
            "float32",
            wanted.layer,
            url=wanted.url,
            pooling=wanted.pooling,
        )
        found = load_embedder(spec, base, url=wanted.url)
    embedder = CachedEmbedder(found, Path(wanted.cache or out / "embeddings"))
    key = noise_key(out, config.privacy)
    with unclaimed(out):
        left_out = LeftOut(out, records, console, once=bool(config.privacy.centroid_noise))

        def admit(name: str) -> Client:
            return Client(name, records[name], embedder, config.seed, config.privacy, key)

        clients: list[Client] = []
        try:
            clients += each(left_out.others, admit)
        except ClientError as failed:
            left_out.add(failed)
        model = quantised(config, path, model)
        trainer = AdapterTrainer(model, tokenizer, config.lora, config.train, config.seed, input_.tokeniser)
        trainer.rehearse([r for name in left_out.others for r in records[name]], config.train.learning_rate)
        federation = LocalFederation(clients, trainer, start_workers(trainer, config, path, processes))
        anew = rereading(config, records, embedder, federation, trainer, left_out, console)
        fresh = trainer.state()
        clustering, state, digest = left_out.without(
            federation, lambda: start(federation, config, fresh, records, out, anew)
        )
        left_out.resuming = False
        claim(out, config)
    for c in clustering.clusters:
        console.print(
            f"task cluster {c.name}: {c.num_examples} rows of {len(c.clients)} clients", highlight=False
        )
    doubtful = doubt(config, [client.num_rows for client in clients], len(clustering.clusters))
    if doubtful:
        console.print(doubtful, highlight=False, soft_wrap=True)
    promised = guarantees(config, clustering.assignments)
    if promised:
        keep_promises(out, config.privacy, promised, key)
    for guarantee in promised:
        console.print(f"privacy: {guarantee}", highlight=False, soft_wrap=True)
    if any((out / "checkpoints").glob("round-*")):
        resumed = f"going on after round {state.number}"
        console.print(
            resumed if state.number else "the checkpoints there are of other rows; starting over",
            highlight=False,
        )
    clustering, state = train_rounds(federation, clustering, state, digest, config, out, console, anew)
    clusters = clustering.clusters
    if not (config.privacy.centroid_noise or config.privacy.update_noise):
        picture.draw(list(federation.clients.values()), [c.name for c in clusters], out, config.seed)
    adapters, generalist, adapter_config = finish(config, state, clusters, trainer.adapter_config)
    return write_bundle(
        out / "bundle",
        base=base,
        embedder=spec,
        clusters=[_with_loss(c, loss) for c, loss in zip(clusters, state.losses, strict=False)],
        adapters=adapters,
        adapter_config={**adapter_config, "base_model_name_or_path": config.base.model},
        space=clustering.space,
        probe_vectors=embedder.probe,
        fallback=config.routing.fallback,
        versions=versions(),
        chat_template=tokenizer.chat_template,
        generalist=generalist,
        guarantees=promised,
        probes=probes,
    )


def load_model(config: Config, path: Path, processes: int) -> tuple[Any, str]:
    """Return base model and dtype as the configuration says; not quantised yet.

    ``processes`` share the machine.

    Raises
    ------
    ConfigError, TrainingError, ModelError
        If there is no such device or package, the model does not load, or has no such modules.
    """
    share_out(config, processes)
    device, dtype = device_and_dtype(config)
    model = load_base(path, dtype, device)
    check_targets(model, config.lora.target_modules)
    return model, dtype


def quantised(config: Config, path: Path, model: Any) -> Any:
    """Return the model to train on: with ``base.quantization`` another one, in place of the given one.

    What serves reads the base unquantised, so the embedder must too: it has done its work by now.
    """
    if config.base.quantization == "none":
        return model
    device, dtype = device_and_dtype(config)
    model.to("meta")  # frees the weights, whoever still holds the model
    gc.collect()
    torch.cuda.empty_cache()
    return load_base(path, dtype, device, config.base.quantization)


def versions() -> dict[str, str]:
    """Return what a bundle records of the libraries that wrote it."""
    return {"fedrouter": __version__, **{name: importlib.metadata.version(name) for name in RECORDED}}


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
    changed = _changed(
        json.loads(file.read_text(encoding="utf-8")), config.model_dump(mode="json", by_alias=True)
    )
    if changed:
        raise TrainingError(
            f"{out} holds a run with another configuration ({', '.join(changed)} differ); "
            "choose another --out, or give the same configuration to go on"
        )


def claim(out: Path, config: Config) -> None:
    """Write the resolved configuration beside the run; not before all that can be refused was."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(
        out / "config.json", json.dumps(config.model_dump(mode="json", by_alias=True), indent=2) + "\n"
    )


def _changed(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [c for k in keys for c in _changed(old.get(k), new.get(k), f"{prefix}.{k}" if prefix else k)]
    return [] if old == new else [prefix]


def _with_loss(c: TaskCluster, loss: float | None) -> TaskCluster:
    return c if loss is None else replace(c, training={"loss": round(loss, 5)})
