"""Rereading clients' files: each client becomes what a run started now would create."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from fakes import LetterEmbedder
from watched import Trainer

from fedrouter.config import Config, DataSettings
from fedrouter.errors import DataError
from fedrouter.train.client.client import Client
from fedrouter.train.client.sources import load_sources
from fedrouter.train.local import LocalFederation
from fedrouter.types import Record

NAMES = ["c0", "c1", "c2"]


def write(file: Path, num_rows: int) -> None:
    rows = [{"prompt": f"{'abcdefgh'[i % 8] * (i + 1)}", "completion": "yes"} for i in range(num_rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def made_by(config: Config) -> LocalFederation:
    """Create clients as a run does."""

    def read(name: str) -> Callable[[], Sequence[Record]]:
        return lambda: load_sources({name: config.data.clients[name]}, config)[name]

    records = load_sources(config.data.clients, config, None)
    return LocalFederation(
        [Client(name, rows, LetterEmbedder(), 0, read=read(name)) for name, rows in records.items()],
        Trainer(),  # type: ignore[arg-type]
    )


def test_a_client_with_a_changed_file_equals_a_new_one(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.jsonl" for name in NAMES}
    for file in files.values():
        write(file, 120)
    config = Config(seed=0, data=DataSettings(clients={name: str(file) for name, file in files.items()}))
    federation = made_by(config)
    before = federation.members()
    vectors = federation.clients[NAMES[0]]._vectors
    write(files[NAMES[1]], 99)
    files[NAMES[2]].write_text("{")  # as if it were just being written
    answers = federation.reread()
    assert [bool(answer.problem) for answer in answers] == [False, False, True]
    write(files[NAMES[2]], 120)
    fresh = made_by(config)
    assert federation.members() == fresh.members()
    assert [a == b for a, b in zip(before, federation.members(), strict=True)] == [True, False, True]
    assert federation.clients[NAMES[0]]._vectors is vectors, "an unchanged client is not embedded again"
    for name, client in fresh.clients.items():
        np.testing.assert_array_equal(federation.clients[name]._vectors, client._vectors)


@pytest.mark.parametrize("name", ["a\nb", "", "x" * 201, "\x1b[31mred"])
def test_an_invalid_name_is_refused_before_anything_is_read(name: str) -> None:
    with pytest.raises(DataError, match="expected a printable name"):
        load_sources({name: "missing.jsonl"}, Config())
