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

from fedrouter.config import Config, DataSettings
from fedrouter.train import start
from fedrouter.train.client import Client
from fedrouter.train.cluster import CROWD, SMALL, crowd
from fedrouter.train.left_out import LeftOut
from fedrouter.train.local import LocalFederation
from fedrouter.train.sources import load_sources

NAMES = [f"c{i:02}" for i in range(CROWD + 1)]


def write(file: Path, num_rows: int) -> None:
    rows = [{"prompt": f"{'abcdefgh'[i % 8] * (i + 1)}", "completion": "yes"} for i in range(num_rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def made_by(config: Config) -> LocalFederation:
    """Clients as a run makes them."""
    records = load_sources(config.data.clients, config, None)
    small = crowd(records)
    return LocalFederation(
        [Client(name, rows, LetterEmbedder(), 0, whole=name in small) for name, rows in records.items()],
        Trainer(),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(("before", "after"), [(SMALL, SMALL - 1), (SMALL - 1, SMALL)])
def test_when_small_clients_become_many_or_few_all_of_them_change(
    before: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: tmp_path / f"{name}.jsonl" for name in NAMES}
    for name, file in files.items():
        write(file, 9 if name > NAMES[1] else SMALL)  # one too few for a crowd
    write(files[NAMES[1]], before)
    config = Config(seed=0, data=DataSettings(clients={name: str(file) for name, file in files.items()}))
    federation = made_by(config)
    records = load_sources(config.data.clients, config, None)
    untouched = federation.clients[NAMES[0]]
    write(files[NAMES[1]], after)
    monkeypatch.setattr(start, "recluster", lambda _federation, _config, old, state: (old, state))
    monkeypatch.setattr(start, "changes", lambda _old, _new: "")
    monkeypatch.setattr(start, "clustering_digest", lambda *_: "")
    clustering: Any = SimpleNamespace(space=None, assignments=())
    state: Any = SimpleNamespace(number=2)
    console = Console(quiet=True)
    left_out = LeftOut(tmp_path, NAMES, console, once=False)
    trainer: Any = SimpleNamespace(take_out=lambda: None, tokeniser=SimpleNamespace(rows=list))
    anew = start.rereading(config, records, LetterEmbedder(), federation, trainer, left_out, console)
    anew(clustering, state)
    assert federation.clients[NAMES[0]] is untouched
    assert records == load_sources(config.data.clients, config, None)
    fresh = made_by(config)
    assert sum(client.whole for client in fresh.clients.values()) in (0, CROWD)
    for name, client in fresh.clients.items():
        np.testing.assert_array_equal(federation.clients[name]._held, client._held)
