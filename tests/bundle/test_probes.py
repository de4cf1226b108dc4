"""Probes are parsed strictly, stored in a bundle, and checked before a reload."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedrouter.bundle import PROBES, parse_probes, read_probes
from fedrouter.errors import DataError
from fedrouter.probes import Asked
from fedrouter.types import Decision, Probe

GOOD = [
    {"prompt": "write a headline", "cluster": "headline"},
    {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"},
        ],
        "cluster": None,
    },
]


def as_lines(*lines: Any) -> bytes:
    return "\n".join(json.dumps(line) for line in lines).encode()


def test_a_line_is_a_conversation_and_where_it_goes(tmp_path: Path) -> None:
    found = parse_probes(as_lines(*GOOD) + b"\n\n", tmp_path / PROBES)
    assert found == (Probe(("write a headline",), "headline"), Probe(("one", "three"), None))
    assert [probe.where for probe in found] == ["line 1", "line 2"]


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "x"},
        {"cluster": "x"},
        {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "cluster": "x"},
        {"messages": [], "cluster": "x"},
        {"prompt": "x", "cluster": 1},
        {"prompt": "x", "cluster": "x", "more": 1},
        ["x"],
    ],
)
def test_what_is_no_probe_is_refused_by_its_line(line: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"probes.jsonl, line 2: "):
        parse_probes(as_lines(GOOD[0], line), tmp_path / PROBES)


def test_files_that_hold_none_or_too_many_are_refused(tmp_path: Path) -> None:
    file = tmp_path / PROBES
    with pytest.raises(DataError, match="No such file"):
        read_probes(file)
    file.write_bytes(b"")
    with pytest.raises(DataError, match="empty"):
        read_probes(file)
    file.write_bytes(as_lines(*[GOOD[0]] * 1001))
    with pytest.raises(DataError, match="1001 probes"):
        read_probes(file)


@pytest.mark.parametrize(
    ("expected", "cluster", "fallback", "holds"),
    [
        ("a", "a", False, True),
        ("a", "b", False, False),
        ("a", "a", True, False),
        (None, "a", True, True),
        (None, "a", False, False),
        (None, "", True, True),
    ],
)
def test_a_probe_holds_where_it_goes_as_it_must(
    expected: str | None, cluster: str, fallback: bool, holds: bool
) -> None:
    decision = Decision("m", cluster, 2.0, 1.6, 1.0, fallback, {})
    asked = Asked(Probe(("some text",), expected, "line 3"), decision)
    assert asked.holds is holds
    assert str(asked).startswith("line 3 ('some text') goes to ")
    assert ("as expected" in str(asked)) is holds
