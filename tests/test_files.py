"""Directories are checked before anything is written; damaged files are named."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from fedrouter.config import Config
from fedrouter.errors import ConfigError, DataError
from fedrouter.files import check_directory
from fedrouter.inspect import read_metrics
from fedrouter.train.client.audit import Audit
from fedrouter.train.run import train


def test_a_directory_is_tried_without_a_trace(tmp_path: Path) -> None:
    check_directory(tmp_path / "a" / "b", "--out")
    check_directory(tmp_path, "--out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file", "file/below", "file/far/below", "n" * 300, "link", "/proc/run"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=f"^--out {tmp_path / place}: cannot be written: "):
        check_directory(tmp_path / place, "--out")


def test_train_refuses_it_before_it_reads_the_rows(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    console = Console(file=(said := io.StringIO()))
    with pytest.raises(ConfigError, match="cannot be written: Not a directory; choose another one"):
        train(Config(), tmp_path / "file" / "run", console)
    assert not said.getvalue()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"round": 1', "expected a JSON object"),
        ("[1]", "expected a JSON object"),
        ("{}", "lacks round"),
        ('{"round": 1, "cluster": "a", "loss": 0.5}', "lacks num_clients, num_examples"),
    ],
)
def test_a_damaged_line_of_metrics_is_named(line: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"round": 0, "left_out": {}}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"metrics.jsonl:2: damaged: {reason}"):
        read_metrics(tmp_path)


def test_the_audit_file_outlives_a_crash_within_a_line(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    Audit(file).write("in", ["Train"], b"abc", "run/0")
    whole = file.read_text()
    file.write_text(whole + whole[:20])
    audit = Audit(file)
    assert file.read_text() == whole
    audit.write("out", ["TrainReply"], b"abcd", "run/0")
    assert (Audit(file).num_requests, Audit(file).num_bytes) == (1, 4)
    file.write_text("{}\n" + whole)
    with pytest.raises(DataError, match=r"audit.jsonl:1: damaged: lacks bytes, time, way"):
        Audit(file)
