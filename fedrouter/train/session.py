"""One training run: its settings, its output directory, and the models loaded for it, each once."""

import gc
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedrouter import __version__
from fedrouter.bundle import read_probes
from fedrouter.config import Config
from fedrouter.embed import Embedder, HiddenStateEmbedder, chosen_spec, load_embedder
from fedrouter.errors import FedRouterError
from fedrouter.files import write_atomically
from fedrouter.layout import print_line
from fedrouter.models import base_spec, load_base
from fedrouter.train.client.client import Client
from fedrouter.train.client.rows import Rendered, load_rows
from fedrouter.train.client.sft import AdapterTrainer
from fedrouter.train.client.sources import load_sources
from fedrouter.train.client.targets import check_targets, left_out
from fedrouter.train.client.workers import Worker, start_workers
from fedrouter.train.disk.cache import CachedEmbedder
from fedrouter.train.machine import device_and_dtype, share_out
from fedrouter.train.side_by_side import StackedTrainer
from fedrouter.types import BaseSpec, EmbedderSpec, Record

RECORDED = ("torch", "transformers", "peft", "trl", "faiss-cpu", "scikit-learn", "numpy")


class Session:
    """The resources of a run. Call ``load``, then ``client`` for each client, then ``load_trainer``.

    The order matters: clients embed with the unmodified base model, and the trainer then adds adapters to it
    or replaces it with a quantised base.

    Parameters
    ----------
    processes : number of adapters trained at a time (workers.py); the processes share the machine.

    Attributes
    ----------
    base, embedder : set by ``load``.
    trainer, workers : set by ``load_trainer``.
    """

    base: BaseSpec
    embedder: CachedEmbedder
    trainer: AdapterTrainer
    workers: Sequence[Worker]

    def __init__(self, config: Config, out: Path, console: Console, processes: int = 1):
        self.config, self.out, self.console, self.processes = config, out, console, processes

    def say(self, line: str) -> None:
        """Print one line without markup, highlighting or wrapping."""
        print_line(self.console, line)

    def load(self, rendered: Rendered, recorded: EmbedderSpec | None = None) -> None:
        """Load the base model and the embedder: ``recorded`` by a bundle, or else chosen by the settings.

        Raises
        ------
        ConfigError, TrainingError, ModelError
            If a device, package or target module is missing, or the model does not load.
        """
        settings, routing = self.config.base, self.config.routing
        self.probes = None if routing.probes is None else read_probes(Path(routing.probes))
        self._rendered = rendered
        share_out(settings, self.processes)
        device, dtype = device_and_dtype(settings)
        self._model: Any = load_base(rendered.path, dtype, device)
        check_targets(self._model, self.config.lora.target_modules)
        for line in left_out(self._model):
            self.say(line)
        self.base = base_spec(settings.model, settings.revision, rendered.path)
        spec = recorded or self._chosen_embedder(dtype)
        url = self.config.embedder.url if spec.kind == "endpoint" else None
        found: Embedder
        if spec.kind == "base":  # the base model has no adapters yet
            found = HiddenStateEmbedder(self._model.base_model, rendered.tokenizer, spec)
        else:
            found = load_embedder(spec, self.base, url=url)
        directory = self.config.embedder.cache or self.out / "embeddings"
        self.embedder = CachedEmbedder(found, Path(directory))

    def _chosen_embedder(self, dtype: str) -> EmbedderSpec:
        spec, why = chosen_spec(self.config.embedder, self.base, self._rendered.path, dtype)
        if why:
            self.say(why)
        return spec

    def client(
        self,
        name: str,
        records: Sequence[Record],
        secret: bytes = b"",
        read: Callable[[], Sequence[Record]] | None = None,
    ) -> Client:
        """Create one client, which embeds its rows at once."""
        return Client(name, records, self.embedder, self.config.seed, self.config.privacy, secret, read)

    def records(self, name: str, strip: bool = False) -> list[Record]:
        """Read a client's rows from its source.

        Parameters
        ----------
        strip : remove their task labels.
        """
        settings = self.config.data
        rows = load_sources({name: settings.clients[name]}, self.config, settings.max_per_client)[name]
        return [replace(row, task=None) for row in rows] if strip else rows

    def read_again(self, name: str, strip: bool = False) -> list[Record]:
        """Read a client's rows again; prepare the base for embedding them and tokenise them for training."""
        self.trainer.take_out()
        rows = self.records(name, strip)
        load_rows(self._rendered.tokeniser, {name: rows})
        return rows

    def load_trainer(self, rows: Sequence[Record]) -> None:
        """Create the trainer and its workers; rehearse a training step on the longest of ``rows``, if any."""
        config, rendered = self.config, self._rendered
        model = self._quantised()
        kind = StackedTrainer if config.train.stacked else AdapterTrainer
        self.trainer = kind(
            model, rendered.tokenizer, config.lora, config.train, config.seed, rendered.tokeniser
        )
        if rows:
            self.trainer.rehearse(rows, config.train.learning_rate)
        self.workers = start_workers(self.trainer, config, rendered.path, self.processes)

    def _quantised(self) -> Any:
        """Return the model to train on: with ``base.quantization``, a quantised one that replaces the first.

        The embedder needs the unquantised base, as serving does, but has embedded all rows by now.
        """
        settings = self.config.base
        if settings.quantization == "none":
            return self._model
        device, dtype = device_and_dtype(settings)
        self._model.to("meta")  # frees the weights even if the model is still referenced
        gc.collect()
        torch.cuda.empty_cache()
        return load_base(self._rendered.path, dtype, device, settings.quantization)

    @property
    def chat_template(self) -> str | None:
        """The chat template that rows were rendered with, for the bundle."""
        template: str | None = self._rendered.tokenizer.chat_template
        return template

    @contextmanager
    def unclaimed(self) -> Iterator[None]:
        """Remove the output directory after an error if it is new and not yet claimed."""
        new = not self.out.exists()
        try:
            yield
        except FedRouterError:
            if new and not (self.out / "config.json").exists():
                shutil.rmtree(self.out, ignore_errors=True)  # holds at most embeddings
            raise

    def claim(self, files: Mapping[str, str] | None = None) -> None:
        """Write the resolved configuration into the output directory, which marks it as this run's.

        Call it only after every check on the input: ``unclaimed`` no longer removes the directory.

        Parameters
        ----------
        files : name → text, written instead.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        resolved = json.dumps(self.config.model_dump(mode="json", by_alias=True), indent=2) + "\n"
        for name, text in (files or {"config.json": resolved}).items():
            write_atomically(self.out / name, text)


def versions() -> dict[str, str]:
    """Return the versions of the libraries that a bundle records."""
    return {"fedrouter": __version__, **{name: importlib.metadata.version(name) for name in RECORDED}}
