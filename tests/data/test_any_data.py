"""Any file is either loaded exactly or refused in one line that names it; no row is lost."""

import csv
import gzip
import io
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedrouter.data import load_records
from fedrouter.errors import DataError
from fedrouter.types import Record, Turn

text = st.text(st.characters(codec="utf-8"), max_size=12)
said = text.filter(str.strip)
KINDS = ("jsonl", "ndjson", "json", "jsonl.gz", "json.gz", "parquet")


def write(path: Path, rows: list[Any]) -> Path:
    """Write rows into a file of the type in its name."""
    kind = path.name.partition(".")[2]
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
        return path
    if kind.startswith("json") and not kind.startswith("jsonl"):
        content = json.dumps(rows, indent=1)
    elif kind[:3] in ("csv", "tsv"):
        out = io.StringIO(newline="")
        table = csv.writer(out, delimiter="\t" if kind[:3] == "tsv" else ",")
        table.writerows([list(rows[0]), *(list(row.values()) for row in rows)])
        content = out.getvalue()
    else:
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    raw = content.encode()
    path.write_bytes(gzip.compress(raw) if kind.endswith("gz") else raw)
    return path


@st.composite
def pairs(draw: st.DrawFn) -> tuple[dict[str, str], Record]:
    """A row of texts, and its record."""
    question, answer = draw(st.sampled_from([("prompt", "completion"), ("instruction", "output")]))
    prompt, system, more, completion = draw(said), draw(text), draw(text), draw(text)
    row = {question: prompt, "input": more, "system": system, answer: completion}
    asked = prompt + (f"\n\n{more}" if more.strip() else "")
    before = (Turn("system", system),) if system.strip() else ()
    return row, Record((*before, Turn("user", asked)), completion)


@st.composite
def chats(draw: st.DrawFn) -> tuple[dict[str, Any], Record]:
    """A conversation in one of the supported forms, and its record."""
    exchanges = draw(st.lists(st.tuples(said, text), min_size=1, max_size=3))
    turns = [t for user, answer in exchanges for t in (("user", user), ("assistant", answer))]
    match draw(st.integers(0, 3)):
        case 0:
            row: dict[str, Any] = {
                "messages": [{"role": role, "content": content} for role, content in turns]
            }
        case 1:
            names = {"user": "human", "assistant": "gpt"}
            row = {"conversations": [{"from": names[role], "value": content} for role, content in turns]}
        case 2:
            history = [list(pair) for pair in exchanges[:-1]]
            row = {"instruction": turns[-2][1], "history": history, "output": turns[-1][1]}
        case _:
            parts = [
                {"role": role, "content": [{"type": "text", "text": content}]} for role, content in turns
            ]
            row = {"messages": parts}
    return row, Record(tuple(Turn(*turn) for turn in turns[:-1]), turns[-1][1])


@given(st.lists(pairs(), min_size=1, max_size=4), st.sampled_from([*KINDS, "csv", "tsv", "csv.gz"]))
def test_rows_of_text_are_loaded_exactly_from_every_kind_of_file(
    tmp_path_factory: pytest.TempPathFactory, cases: list[tuple[dict[str, Any], Record]], kind: str
) -> None:
    cases = [case for case in cases if set(case[0]) == set(cases[0][0])]  # a table has a single header
    path = write(tmp_path_factory.mktemp("any") / f"rows.{kind}", [row for row, _ in cases])
    assert load_records(str(path), say=pytest.fail) == [record for _, record in cases]


@given(st.lists(chats(), min_size=1, max_size=4), st.sampled_from(KINDS))
def test_conversations_are_loaded_exactly_whatever_their_form(
    tmp_path_factory: pytest.TempPathFactory, cases: list[tuple[dict[str, Any], Record]], kind: str
) -> None:
    if kind == "parquet":  # rows must have the same fields
        cases = cases[:1]
    path = write(tmp_path_factory.mktemp("any") / f"rows.{kind}", [row for row, _ in cases])
    assert load_records(str(path), say=pytest.fail) == [record for _, record in cases]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
NAMES = ("prompt", "completion", "instruction", "output", "input", "system", "history", "messages",
         "conversations", "tools", "task", "other")  # fmt: skip
messages = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "tool", "system", "x"]) | values,
        "from": st.sampled_from(["human", "gpt", "function_call"]) | values,
        "content": values,
        "value": values,
        "tool_calls": st.lists(st.fixed_dictionaries({"function": values})) | values,
        "weight": values,
    },
)
odd_rows = (
    st.dictionaries(st.sampled_from(NAMES), st.lists(messages, max_size=3) | values, max_size=5) | values
)


@given(st.lists(odd_rows, max_size=4), st.sampled_from(["jsonl", "json"]))
def test_odd_rows_are_loaded_one_by_one_or_refused_by_row(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], kind: str
) -> None:
    path = write(tmp_path_factory.mktemp("odd") / f"rows.{kind}", rows)
    notes: list[str] = []
    try:
        records = load_records(str(path), say=notes.append)
    except DataError as error:
        line = str(error).replace(str(path), "FILE")
        assert "\n" not in line
        assert re.match(r"FILE:\d+( \(row \d+\))?:|FILE: has no rows", line), line
        assert rows == [] or "has no rows" not in line
    else:
        assert len(records) == len(rows)
        assert all(len(note.splitlines()) == 1 for note in notes) and len(notes) <= 2
        for row in rows:
            assert (
                "other" not in row or not any(map(str.strip, texts(row["other"]))) or "other (" in notes[-1]
            )


def texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [found for one in inner for found in texts(one)]


GOOD = {
    "jsonl": b'{"prompt": "p", "completion": "c"}\n{"prompt": "q", "completion": "d"}\n',
    "json": b'[{"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": "d"}]',
    "csv": b'prompt,completion\n"p, q",c\np,"d ""e"""\n',
    "tsv": b"prompt\tcompletion\np\tc\nq\td\n",
    "jsonl.gz": gzip.compress(b'{"prompt": "p", "completion": "c"}\n', mtime=0),
}


@given(st.sampled_from(sorted(GOOD)), st.integers(0, 80), st.integers(0, 4), st.binary(max_size=4))
@example("csv", 18, 0, b"\x00")
def test_a_damaged_file_is_read_or_refused_in_one_line_with_its_name(
    tmp_path_factory: pytest.TempPathFactory, kind: str, at: int, cut: int, put: bytes
) -> None:
    path = tmp_path_factory.mktemp("damaged") / f"rows.{kind}"
    good = GOOD[kind]
    path.write_bytes(good[:at] + put + good[at + cut :])
    try:
        records = load_records(str(path), say=lambda _: None)
    except DataError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        assert records and all(record.turns[-1].content.strip() for record in records)
