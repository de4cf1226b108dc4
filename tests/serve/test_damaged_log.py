"""A decision log with damaged lines is replayed without them, and they are counted."""

import json
from pathlib import Path
from typing import Any

import pytest
from echo import TASKS, WordEmbedder
from rich.console import Console

from fedrouter.bundle import Bundle
from fedrouter.errors import DataError
from fedrouter.layout import show
from fedrouter.replay import DAMAGED, render, replay
from fedrouter.serve.decision_log import packed
from fedrouter.types import LoggedDecision

PLAIN = LoggedDecision(1.5, "0" * 32, 0, "ab", None, "m", "summary", 0.1, 1.0, 0.2, False, "", 0, 1, 0.3)


def line(**changes: Any) -> bytes:
    [vector] = WordEmbedder().embed([TASKS["summary"]])
    kept = {name: getattr(PLAIN, name) for name in LoggedDecision.__slots__}
    return json.dumps({**kept, "vectors": [packed(vector)], **changes}).encode()


@pytest.mark.parametrize(
    ("damaged", "problem"),
    [
        (line()[:90], "EOF while parsing"),
        (line()[:40] + b"\xff" + line()[40:], "invalid unicode"),
        (line(vectors=["AAAA"]), "vectors.0: not base64 of finite float16 values"),
        (line(vectors=["!!!"]), "vectors.0: not base64 of finite float16 values"),
        (line(vectors=["AHw="]), "vectors.0: not base64 of finite float16 values"),  # infinity
        (line(turns="two"), "turns: Input should be a valid integer"),
        (b"{}", "time: Field required"),
        (b"7", "Input should be an object"),
        (b"[" * 100_000, "recursion limit"),
    ],
)
def test_damaged_lines_are_skipped_and_counted(
    word_bundle: Bundle, tmp_path: Path, damaged: bytes, problem: str
) -> None:
    log = tmp_path / "decisions.jsonl"
    log.write_bytes(b"\n".join([line(), damaged, line(), b"", damaged]))
    found = replay(log, word_bundle, WordEmbedder())
    assert (found.num_decided, found.num_skipped) == (2, {DAMAGED: 2})
    told = found.to_json()
    assert told["skipped"] == {DAMAGED: 2}
    assert f"{log}, line 2: not a line of a decision log: " in told["first_damaged"]
    assert problem in told["first_damaged"]
    log.write_bytes(b"\n" + damaged)
    with pytest.raises(DataError, match="line 2: not a line of a decision log"):
        replay(log, word_bundle, WordEmbedder())


def test_the_first_damaged_line_is_named(
    word_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "decisions.jsonl"
    log.write_bytes(line() + b"\n{")
    show(Console(width=500), render(replay(log, word_bundle, WordEmbedder())))
    assert f"skipped 1: {DAMAGED}; the first: {log}, line 2: " in capsys.readouterr().out


def test_vectors_of_another_length_are_not_called_damaged(word_bundle: Bundle, tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"
    log.write_bytes(line(vectors=["AAA="]))
    found = replay(log, word_bundle, WordEmbedder())
    assert found.num_skipped == {"vectors of another length than the bundle's embedder has": 1}


def test_a_directory_is_not_called_missing(word_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a directory; give the log file in it"):
        replay(tmp_path, word_bundle, WordEmbedder())
