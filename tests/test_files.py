"""Whether a directory can be written is known before anything is written into it."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from fedrouter.config import Config
from fedrouter.errors import ConfigError
from fedrouter.files import check_directory
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
