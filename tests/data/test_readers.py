"""Text files: every cell is unchanged, every error names its line and row."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from fedrouter.data import load_records
from fedrouter.data.readers import read_rows
from fedrouter.errors import DataError
from fedrouter.types import Record, Turn

ROWS = [
    {"prompt": "When does it open?\nOn day 1 of May.", "completion": "2024-05-01"},
    {"prompt": "é €", "completion": "12:30"},
]
RECORDS = [Record((Turn("user", row["prompt"]),), row["completion"]) for row in ROWS]


def refused(path: Path) -> str:
    with pytest.raises(DataError) as error:
        load_records(str(path))
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{path.parent}/", "")


def load_csv(tmp_path: Path, text: str, name: str = "rows.csv") -> list[tuple[str, str]]:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return [(r.turns[-1].content, r.completion) for r in load_records(str(path))]


def test_the_same_rows_in_every_kind_of_file(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    texts = {
        "a.jsonl": lines,
        "a.ndjson": lines,
        "a.json": json.dumps(ROWS),
        "pretty.json": json.dumps(ROWS, indent=2, ensure_ascii=False),
        "lines.json": lines,
        "a.csv": 'prompt,completion\r\n"When does it open?\nOn day 1 of May.",2024-05-01\r\né €,12:30\r\n',
        "a.tsv": 'prompt\tcompletion\n"When does it open?\nOn day 1 of May."\t2024-05-01\n\né €\t12:30\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        with gzip.open(tmp_path / f"{name}.gz", "wb") as file:
            file.write(text.encode())
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            assert load_records(str(path)) == RECORDS, path


def test_places_are_lines_and_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,completion\n"p\nq",c\n\nr,d\n')
    assert [where for where, _ in read_rows(tmp_path / "a.csv")] == [
        f"{tmp_path}/a.csv:2 (row 1)",
        f"{tmp_path}/a.csv:5 (row 2)",
    ]
    (tmp_path / "a.json").write_text('[\n {"a": 1},\n\n {"a": 2}]')
    assert [where for where, _ in read_rows(tmp_path / "a.json")] == [
        f"{tmp_path}/a.json:2 (row 1)",
        f"{tmp_path}/a.json:4 (row 2)",
    ]


def test_cells_of_csv_are_text_whatever_they_look_like(tmp_path: Path) -> None:
    answers = ["0", "1", "True", "None", "N/A", "null", "NaN", "", "007", "1.10", "2024-05-01", "1e5"]
    text = "prompt,completion\n" + "".join(f"p,{answer}\n" for answer in answers)
    assert load_csv(tmp_path, text) == [("p", answer) for answer in answers]
    rows = "instruction,input,output\n" + "".join(f"i,{word},o\n" for word in ("None", "N/A", "null", ""))
    prompts = [prompt for prompt, _ in load_csv(tmp_path, rows)]
    assert prompts == ["i\n\nNone", "i\n\nN/A", "i\n\nnull", "i"]


def test_an_unquoted_comma_is_refused_with_row_and_fields(tmp_path: Path) -> None:
    (tmp_path / "shift.csv").write_text("prompt,completion\nAdd 2 and 2,It is 4, as asked\n")
    assert refused(tmp_path / "shift.csv").startswith(
        "shift.csv:2 (row 1): 3 fields, but the header has 2 (prompt, completion); put fields that contain"
    )
    (tmp_path / "short.tsv").write_text('prompt\tcompletion\np\tc\n"a\nb"\n')
    assert "short.tsv:3 (row 2): 1 fields, but the header has 2" in refused(tmp_path / "short.tsv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"prompt,completion\n", "a.csv: has no rows"),
        ("a.csv", b"", "a.csv: has no rows"),
        ("a.csv", b'prompt,completion\np,c\n"q,c\n', "a.csv:3 (row 2): not CSV: unexpected end of data"),
        ("a.csv", b'prompt,completion\n"a" b,c\n', "a.csv:2 (row 1): not CSV: ',' expected after '\"'"),
        ("a.csv", b"prompt,prompt\np,c\n", "a.csv:1: the header names a field twice: prompt"),
        ("a.csv", b"prompt;completion\np;c\n", "a.csv:1: the header is one field, "),
        ("a.csv", b"\n\nprompt,prompt\np,c\n", "a.csv:3: the header names a field twice: prompt"),
        ("a.csv", b"prompt;completion\np, q;c\n", 'separates fields by a comma, not by ";"; save the file'),
        ("a.tsv", b"prompt,completion\np,c\n", 'separates fields by a tab, not by ","; save the file'),
        ("a.csv", b"prompt,completion\np,c\ncaf\xe9,c\n", "a.csv:3: not UTF-8 (byte 4 of the line)"),
        ("a.csv", "prompt,completion\np,c\n".encode("utf-16"), "a.csv:1: not UTF-8"),
        ("a.json", b"[]", "a.json: has no rows"),
        ("a.json", b" \n", "a.json: has no rows"),
        ("a.json", b'"text"', "a.json:1: expected a list of objects, or one object per line"),
        (
            "a.json",
            b'[{"prompt": "p", "completion": "c"},\n{"prompt" "q"}]',
            "a.json:2 (row 2): not JSON: Exp",
        ),
        (
            "a.json",
            b'[{"prompt": "p", "completion": "c"}',
            "a.json:1 (row 1): not JSON: the file ends after this row",
        ),
        (
            "a.json",
            b'[{"prompt": "p", "completion": "c"} 3]',
            "a.json:1 (row 1): not JSON: found '3' after this row, expected , or ]",
        ),
        (
            "a.json",
            b'[{"prompt": "p", "completion": "c"}]\n[]',
            "a.json:2: not JSON: the file continues after",
        ),
        ("a.json", b'[{"prompt": "p", "completion": "c"}, 3]', "a.json:1 (row 2): expected an object with"),
        ("a.json", b"[" * 100_000, "a.json:1 (row 1): not usable JSON"),
        ("a.json", b"[\n\xff]", "a.json:2: not UTF-8 (byte 1 of the line)"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz: damaged gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "p", "completion": "c"}\n')[:-9], "damaged gzip file"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in refused(tmp_path / name)


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    assert load_csv(tmp_path, f"prompt,completion\n{'p' * 200_000},c\n") == [("p" * 200_000, "c")]


def test_a_file_written_again_with_the_same_time_gives_its_new_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    ways: dict[str, Callable[[Path, Any], Any]] = {
        "a.json": lambda path, rows: path.write_text(json.dumps(rows)),
        "a.parquet": lambda path, rows: datasets.Dataset.from_list(rows).to_parquet(path),
    }
    for name, write in ways.items():
        path = tmp_path / name
        write(path, ROWS[:1] * 2)
        os.utime(path, (1_000_000_000, 1_000_000_000))
        assert load_records(str(path)) == RECORDS[:1] * 2
        write(path, ROWS)
        os.utime(path, (1_000_000_000, 1_000_000_000))
        assert load_records(str(path)) == RECORDS
    assert not (tmp_path / "cache").exists(), "no copy of rows in a cache"


def test_typed_cells_become_text_only_where_nothing_is_lost(tmp_path: Path) -> None:
    labels = datasets.Features(
        {"prompt": datasets.Value("string"), "completion": datasets.ClassLabel(names=["no", "yes"])}
    )
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"prompt": ["p", "q"], "completion": [1, 0]}, features=labels).to_parquet(path)
    assert [r.completion for r in load_records(str(path))] == ["yes", "no"]
    datasets.Dataset.from_dict({"prompt": ["p"], "completion": [7]}).to_parquet(path)
    assert load_records(str(path))[0].completion == "7"
    for value, found in ((True, "bool"), (0.1, "float")):
        datasets.Dataset.from_dict({"prompt": ["p"], "completion": [value]}).to_parquet(path)
        assert f"a.parquet row 1: field completion must be text, found {found}" in refused(path)
