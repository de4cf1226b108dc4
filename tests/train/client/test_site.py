"""A site's files: damaged ones are named in one line, with what to do."""

import json
from pathlib import Path
from typing import Any

import pytest
from loopback import resident, site

from fedrouter.errors import ConfigError, DataError, FedRouterError
from fedrouter.files import read_secret
from fedrouter.train.client.audit import Audit
from fedrouter.train.client.site import Site
from fedrouter.train.client.site_files import make_site
from fedrouter.train.flower import status as status_of
from fedrouter.train.flower.federation import Directory, FederationSettings
from fedrouter.train.wire.keys import new_key, public_text, read_public


@pytest.fixture
def ulm(tmp_path: Path) -> Site:
    return site(tmp_path, "ulm", tmp_path / "rows.jsonl")[0]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("exchanges.json", "{", "cannot be read as JSON: .*; restore or remove it"),
        ("exchanges.json", "[]", "damaged: expected an object of int values; restore or remove it"),
        ("exchanges.json", '{"run": "1"}', "damaged: expected an object of int values"),
        ("noise.key", "no hex", "damaged: expected 64 hex digits; restore it, or remove it"),
        ("noise.key", "", "damaged: expected 64 hex digits"),
        ("noise.key", None, "cannot be opened: Is a directory"),
        ("audit.jsonl", None, "cannot be opened: Is a directory; restore or remove it"),
        (
            "audit.jsonl",
            '{"time": "", "way": "in", "bytes": "x"}\n',
            "time, way or bytes is of the wrong type",
        ),
        ("audit.jsonl", '{"time": 1, "way": "in", "bytes": 1}\n', "time, way or bytes is of the wrong type"),
    ],
)
def test_a_damaged_file_of_a_site_is_named(ulm: Site, name: str, content: str | None, why: str) -> None:
    file = ulm.directory / name
    file.mkdir() if content is None else file.write_text(content)
    with pytest.raises(FedRouterError, match=rf"^{file}(:1)?: .*{why}"):
        resident(ulm)


def test_a_secret_is_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "noise.key").write_text("abcg")
    with pytest.raises(DataError) as caught:
        read_secret(tmp_path / "noise.key")
    assert "abcg" not in str(caught.value)


def test_the_line_of_the_audit_file_is_named(ulm: Site) -> None:
    Audit(ulm.audit).write("in", ["Train"], b"abc", "run/0")
    ulm.audit.write_text(ulm.audit.read_text() + '{"time": "", "way": "in", "bytes": true}\n')
    with pytest.raises(DataError, match=r"audit.jsonl:2: damaged: .*; remove the line"):
        Audit(ulm.audit)


@pytest.mark.parametrize(
    ("content", "why"), [(None, "cannot be read"), (b"\xff", "cannot be read"), (b"garbage", "no public key")]
)
def test_a_damaged_public_key_is_named(tmp_path: Path, content: bytes | None, why: str) -> None:
    file = tmp_path / "site.pub"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{file}: {why}"):
        read_public(file)


def test_a_site_is_not_made_onto_a_file(tmp_path: Path) -> None:
    (tmp_path / "ulm").touch()
    with pytest.raises(ConfigError, match=r"--dir .*ulm: cannot be written: Not a directory; choose another"):
        make_site(tmp_path / "ulm", "ulm", "rows.jsonl", "127.0.0.1:9092")


def looked(path: Path, monkeypatch: pytest.MonkeyPatch, node: dict[str, Any]) -> list[dict[str, object]]:
    key = public_text(new_key(path / "site.key").public_key())
    made = Directory(path, FederationSettings(clients={"ulm": key}))
    monkeypatch.setattr(status_of, "load_directory", lambda _: made)
    monkeypatch.setattr(status_of, "nodes", lambda _: {key: node})
    return status_of.status(path)


def test_the_status_has_one_form_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {"rows": 9, "time": "2026-01-02 03:04:05Z", "what": "TrainRequest"}
    (tmp_path / "seen.json").write_text(json.dumps({"ulm": seen}))
    node = {"status": "online", "online": "2026-01-02T04:04:05.678+01:00", "offline": ""}
    (row,) = looked(tmp_path, monkeypatch, node)
    assert row == {
        "client": "ulm",
        "status": "online",
        "since": "2026-01-02 03:04:05Z",
        "rows": 9,
        "last_answer": "2026-01-02 03:04:05Z",
        "request": "TrainRequest",
    }


@pytest.mark.parametrize("content", ["{", "[]", '{"ulm": 3}'])
def test_damaged_answers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    (tmp_path / "seen.json").write_text(content)
    with pytest.raises(DataError, match=r"seen.json: .*; restore or remove it"):
        looked(tmp_path, monkeypatch, {})
