import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrouter.builtin.tasks import TASKS
from fedrouter.data import builtin_records, load_records
from fedrouter.data.tables import hub_rows
from fedrouter.errors import ConfigError, DataError
from fedrouter.types import Record, Turn

PAIRS = [{"prompt": f"question {n}", "completion": f"answer {n}", "task": "quiz"} for n in range(3)]
RECORDS = [Record((Turn("user", f"question {n}"),), f"answer {n}", "quiz") for n in range(3)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load_one(tmp_path: Path, row: dict[str, Any]) -> Record:
    return load_records(write(tmp_path / "one.jsonl", row))[0]


def refused(tmp_path: Path, content: str | bytes) -> str:
    """Write the content, load it, and return the error's line without the folder."""
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        load_records(str(path))
    message = str(error.value)
    assert "\n" not in message
    return message.replace(f"{tmp_path}/", "")


def test_prompt_and_completion(tmp_path: Path) -> None:
    assert load_records(write(tmp_path / "pairs.jsonl", *PAIRS)) == RECORDS


def test_instruction_with_and_without_input(tmp_path: Path) -> None:
    row = {"instruction": "Translate.", "input": "Guten Tag", "response": "Good day"}
    assert load_one(tmp_path, row) == Record((Turn("user", "Translate.\n\nGuten Tag"),), "Good day")
    for nothing in ("", None):
        assert load_one(tmp_path, {**row, "input": nothing}).turns == (Turn("user", "Translate."),)


def test_alpaca_calls_the_answer_output(tmp_path: Path) -> None:
    record = load_one(
        tmp_path, {"instruction": "Say hi.", "input": "", "output": "hi", "text": "whole prompt"}
    )
    assert record == Record((Turn("user", "Say hi."),), "hi")


def test_chat_keeps_the_earlier_turns(tmp_path: Path) -> None:
    turns = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Bye"),
        ("assistant", "See you"),
    ]
    row = {"prompt": "Hi", "messages": [{"role": role, "content": content} for role, content in turns]}
    assert load_one(tmp_path, row) == Record(tuple(Turn(*turn) for turn in turns[:-1]), "See you")


def test_lines_are_split_at_newlines_only_and_blank_ones_skipped(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    text = (
        "\ufeff"
        + json.dumps({"prompt": "a\u2028b", "completion": "c\x85d"}, ensure_ascii=False)
        + "\r\n\n  \n"
    )
    path.write_bytes(text.encode())
    assert load_records(str(path)) == [Record((Turn("user", "a\u2028b"),), "c\x85d")]


@given(st.text().filter(str.strip), st.text().filter(str.strip))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, prompt: str, completion: str) -> None:
    path = tmp_path_factory.mktemp("any") / "any.jsonl"
    for ensure_ascii in (True, False):
        row = json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=ensure_ascii)
        path.write_text(row + "\n", encoding="utf-8", newline="\n")
        assert load_records(str(path)) == [Record((Turn("user", prompt),), completion)]


@given(st.binary())
def test_any_garbage_is_a_data_error(tmp_path_factory: pytest.TempPathFactory, garbage: bytes) -> None:
    path = tmp_path_factory.mktemp("garbage") / "garbage.jsonl"
    path.write_bytes(garbage)
    with pytest.raises(DataError):
        load_records(str(path))


@pytest.mark.parametrize("number", ["1", "true", "null", '"text"', "[]"])
def test_a_line_that_is_no_object(tmp_path: Path, number: str) -> None:
    assert "bad.jsonl:1: expected an object with fields, found" in refused(tmp_path, number)


GOOD = '{"prompt": "p", "completion": "c"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "bad.jsonl: has no rows"),
        ("\n \n", "bad.jsonl: has no rows"),
        (GOOD + "\n" + "{'prompt': 1}\n", "bad.jsonl:3: not JSON: Expecting property name"),
        (GOOD + '{"prompt": "p", "comp', "bad.jsonl:2: not JSON: Unterminated string"),
        (
            GOOD + GOOD.strip() * 2,
            "bad.jsonl:2: not JSON: Extra data (column 35); expected one object per line",
        ),
        (GOOD.encode() + b'{"prompt": "caf\xe9"}', "bad.jsonl:2: not UTF-8 (byte 16 of the line)"),
        ('{"prompt": "p", "prompt": "q", "completion": "c"}', "bad.jsonl:1: a field appears twice: prompt"),
        ('{"prompt": "p", "completion": "c", "score": NaN}', "bad.jsonl:1: NaN is not JSON"),
        ("[" * 100_000, "bad.jsonl:1: not usable JSON"),
        ('{"prompt": ' + "1" * 5000 + "}", "bad.jsonl:1: not usable JSON"),
        (
            '{"prompt": "p", "answer": "c"}',
            "bad.jsonl:1: missing fields: found prompt, answer; accepted: messages,",
        ),
        (
            "{}",
            "bad.jsonl:1: missing fields: found none; accepted: messages, prompt + completion, or",
        ),
        ('{"prompt": null, "completion": "c"}', "bad.jsonl:1: missing fields: found completion"),
        ('{"prompt": ["p"], "completion": "c"}', "bad.jsonl:1: field prompt must be text, found list"),
        ('{"prompt": "p", "completion": 7}', "bad.jsonl:1: field completion must be text, found int"),
        ('{"prompt": " ", "completion": "c"}', "bad.jsonl:1: field prompt is empty"),
        ('{"prompt": "p", "completion": "c", "task": "a\\nb"}', "bad.jsonl:1: field task must be printable"),
        ('{"prompt": "\\ud83d", "completion": "c"}', "bad.jsonl:1: field prompt contains half a character"),
        ('{"prompt": "p", "completion": "c", "task": 3}', "bad.jsonl:1: field task must be text, found int"),
        ('{"instruction": "i", "input": 3, "output": "o"}', "bad.jsonl:1: field input must be text"),
        ('{"messages": "hi"}', "bad.jsonl:1: messages must be a list of objects"),
        ('{"messages": []}', "bad.jsonl:1: messages must end with a user turn and the assistant's answer"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "messages must end with a user turn and"),
        ('{"messages": [{"role": "judge", "content": "hi"}]}', "bad.jsonl:1: message 1 has role 'judge'"),
        (
            '{"messages": [{"role": "user", "content": [{}]}]}',
            "bad.jsonl:1: message 1: field content must be text",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    assert message in refused(tmp_path, content)


def test_missing_files(tmp_path: Path) -> None:
    for name in ("gone.jsonl", "gone.csv", "gone"):
        with pytest.raises(DataError, match=f"{name}: no such file"):
            load_records(str(tmp_path / name))


def test_a_file_of_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "rows.xml").write_text("<row/>")
    with pytest.raises(
        DataError,
        match=r"rows.xml: unknown file type; accepted: .jsonl, .ndjson, .json, .csv, .tsv, .parquet",
    ):
        load_records(str(tmp_path / "rows.xml"))


def test_an_unknown_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"^nobody/nothing: neither a file or directory nor a usable data set on the hub"
    ):
        load_records("nobody/nothing")


def test_files_that_datasets_reads(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(PAIRS)
    data.to_csv(tmp_path / "rows.csv")
    data.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(PAIRS))
    for kind in ("csv", "parquet", "json"):
        assert load_records(str(tmp_path / f"rows.{kind}")) == RECORDS


def test_saved_data_sets_and_their_splits(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(PAIRS)
    data.save_to_disk(tmp_path / "single")
    datasets.DatasetDict({"train": data, "test": data.select([2])}).save_to_disk(tmp_path / "both")
    assert load_records(str(tmp_path / "single")) == RECORDS
    assert load_records(str(tmp_path / "both")) == RECORDS
    assert load_records(str(tmp_path / "both"), split="test") == RECORDS[2:]
    said: list[str] = []
    (tmp_path / "both" / "extra.jsonl").write_text("x")
    load_records(str(tmp_path / "both"), say=said.append)
    assert said == [f"{tmp_path}/both: not read: split test (1 rows), extra.jsonl"]
    load_records(str(tmp_path / "single"), say=pytest.fail)
    with pytest.raises(DataError, match="single: no split 'nonsense': it has no splits"):
        load_records(str(tmp_path / "single"), split="nonsense")
    with pytest.raises(DataError, match="both: no split 'dev'; it has train, test"):
        load_records(str(tmp_path / "both"), split="dev")


def test_a_directory_of_files_has_splits(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "train.jsonl", *PAIRS)
    write(folder / "test.jsonl", PAIRS[1])
    assert load_records(str(folder)) == RECORDS
    assert load_records(str(folder), split="test") == RECORDS[1:2]
    with pytest.raises(DataError, match=r"rows: no split 'dev'; it has test, train"):
        load_records(str(folder), split="dev")
    write(folder / "val.jsonl", PAIRS[2])
    assert load_records(str(folder), split="val") == RECORDS[2:]


def test_other_splits_of_the_hub_are_named(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", *PAIRS)
    write(tmp_path / "test.jsonl", PAIRS[1])
    said: list[str] = []
    assert len(list(hub_rows(str(tmp_path), None, said.append))) == 3
    assert said[1:] == [f"{tmp_path}: not read: split test (1 rows)"]


def test_chat_and_missing_values_through_datasets(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [{"messages": chat, "task": None}, {"messages": chat, "task": "greet"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "chat.parquet")
    greeting = (Turn("user", "Hi"),)
    assert load_records(str(tmp_path / "chat.parquet")) == [
        Record(greeting, "Hello"),
        Record(greeting, "Hello", "greet"),
    ]


def test_bad_rows_of_data_sets_are_named(tmp_path: Path) -> None:
    datasets.Dataset.from_list([PAIRS[0], {"prompt": "q"}]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows.parquet row 2: missing fields: found prompt; accepted"):
        load_records(str(tmp_path / "rows.parquet"))
    (tmp_path / "broken.parquet").write_text("{not parquet")
    with pytest.raises(DataError, match=r"broken.parquet: not readable as Parquet: "):
        load_records(str(tmp_path / "broken.parquet"))
    (tmp_path / "broken.json").write_text("{not json")
    with pytest.raises(DataError, match=r"broken.json:1: not JSON"):
        load_records(str(tmp_path / "broken.json"))
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match=r"empty.csv: "):
        load_records(str(tmp_path / "empty.csv"))


def test_builtin_records() -> None:
    records = builtin_records("builtin:four-tasks", "train", 5, seed=1)
    assert [record.task for record in records] == [task for task in TASKS for _ in range(5)]
    assert records == builtin_records("builtin:four-tasks", "train", 5, seed=1)
    assert records != builtin_records("builtin:four-tasks", "test", 5, seed=1)


def test_unknown_builtin_names() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown built-in data set 'builtin:five'.*choose one of builtin:four-tasks"
    ):
        builtin_records("builtin:five", "train", 5, 1)
    with pytest.raises(ConfigError, match="has no split 'dev'"):
        builtin_records("builtin:four-tasks", "dev", 5, 1)
