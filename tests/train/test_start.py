"""Clients' files read again: each client becomes the one that a run started now would make of it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes import LetterEmbedder
from rich.console import Console
from watched import Trainer

from fedrouter.builtin import base_path
from fedrouter.config import Config, DataSettings
from fedrouter.errors import DataError
from fedrouter.models import load_tokenizer
from fedrouter.train import start
from fedrouter.train.client.client import Client
from fedrouter.train.client.rows import Tokeniser
from fedrouter.train.client.sources import load_sources
from fedrouter.train.local import LocalFederation
from fedrouter.train.server.left_out import LeftOut

NAMES = ["c0", "c1", "c2"]


def write(file: Path, num_rows: int) -> None:
    rows = [{"prompt": f"{'abcdefgh'[i % 8] * (i + 1)}", "completion": "yes"} for i in range(num_rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def made_by(config: Config) -> LocalFederation:
    """Clients as a run makes them."""
    records = load_sources(config.data.clients, config, None)
    return LocalFederation(
        [Client(name, rows, LetterEmbedder(), 0) for name, rows in records.items()],
        Trainer(),  # type: ignore[arg-type]
    )


def test_the_client_whose_file_has_changed_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: tmp_path / f"{name}.jsonl" for name in NAMES}
    for file in files.values():
        write(file, 120)
    config = Config(seed=0, data=DataSettings(clients={name: str(file) for name, file in files.items()}))
    federation = made_by(config)
    records = load_sources(config.data.clients, config, None)
    untouched = federation.clients[NAMES[0]]
    write(files[NAMES[1]], 99)
    monkeypatch.setattr(start, "recluster", lambda _federation, _config, old, state: (old, state))
    monkeypatch.setattr(start, "changes", lambda _old, _new: "")
    monkeypatch.setattr(start, "clustering_digest", lambda *_: "")
    clustering: Any = SimpleNamespace(space=None, assignments=())
    state: Any = SimpleNamespace(number=2)
    console = Console(quiet=True)
    left_out = LeftOut(tmp_path, NAMES, console, once=False)
    tokenizer = load_tokenizer(base_path("builtin:tiny"))
    trainer: Any = SimpleNamespace(take_out=lambda: None, tokeniser=Tokeniser(tokenizer, 64))
    anew = start.rereading(config, records, LetterEmbedder(), federation, trainer, left_out, console)
    anew(clustering, state)
    assert federation.clients[NAMES[0]] is untouched
    assert records == load_sources(config.data.clients, config, None)
    fresh = made_by(config)
    for name, client in fresh.clients.items():
        np.testing.assert_array_equal(federation.clients[name]._held, client._held)


@pytest.mark.parametrize("name", ["a\nb", "", "x" * 201, "\x1b[31mred"])
def test_a_name_that_no_bundle_can_hold_is_refused_before_anything_is_read(name: str) -> None:
    with pytest.raises(DataError, match="expected a printable name"):
        load_sources({name: "missing.jsonl"}, Config())
