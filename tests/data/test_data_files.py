"""Directories: every data file is read, or refused by name."""

import json
from pathlib import Path

import datasets
import pytest

from fedrouter.data import load_records
from fedrouter.errors import DataError


def write(path: Path, *prompts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": prompt, "completion": "c"} for prompt in prompts]
    path.write_text(
        json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(r) + "\n" for r in rows)
    )


def load(path: Path, split: str | None = None) -> tuple[list[str], list[str]]:
    said: list[str] = []
    return [r.turns[0].content for r in load_records(str(path), split, say=said.append)], said


def test_a_name_that_holds_train_does_not_hide_the_others(tmp_path: Path) -> None:
    write(tmp_path / "adapter-train-1.jsonl", "a")
    write(tmp_path / "other.jsonl", "b")
    assert load(tmp_path) == (["a", "b"], [])
    (tmp_path / "adapter-train-1.jsonl").rename(tmp_path / "adapter-test-1.jsonl")
    found, (said,) = load(tmp_path)
    assert found == ["a", "b"] and "a split occurs in the name: adapter-test-1.jsonl; " in said
    for source in (tmp_path, tmp_path / "other.jsonl"):
        with pytest.raises(DataError, match="no split 'test': it has no splits; remove the setting"):
            load(source, "test")
    records = load_records(str(tmp_path / "other.jsonl"), say=pytest.fail, default="test")
    assert [r.turns[0].content for r in records] == ["b"]


def test_two_kinds_of_files_and_folders_are_read_together(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "a")
    write(tmp_path / "b.json", "b")
    (tmp_path / "c.csv").write_text("prompt,completion\nc,1\n")
    write(tmp_path / "deep" / "er" / "d.ndjson", "d")
    datasets.Dataset.from_list([{"prompt": "e", "completion": "c"}]).to_parquet(tmp_path / "e.parquet")
    (tmp_path / "README.md").write_text("# a card")
    (tmp_path / ".gitattributes").write_text("")
    found, said = load(tmp_path)
    assert sorted(found) == list("abcde")
    assert said == [f"{tmp_path}: not read: .gitattributes, README.md"]


@pytest.mark.parametrize("name", ["rows.txt", "rows.jsonl.bz2", "rows.xlsx", "loose.arrow", "rows"])
def test_a_file_of_no_known_kind_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.jsonl", "a")
    (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=f"{name}: unknown file type in a data directory; move it elsewhere"):
        load(tmp_path)


def test_splits_are_read_where_all_files_are_of_one(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.jsonl", "a")
    write(tmp_path / "train-00001-of-00002.jsonl", "b")
    write(tmp_path / "test" / "rows.jsonl", "c")
    assert load(tmp_path) == (["a", "b"], [f"{tmp_path}: not read: test/rows.jsonl (split train)"])
    assert load(tmp_path, "test")[0] == ["c"]
    with pytest.raises(DataError, match="no split 'validation'; it has test, train"):
        load(tmp_path, "validation")
    (tmp_path / "test" / "rows.jsonl").rename(tmp_path / "dev.jsonl")
    (tmp_path / "test").rmdir()
    for name in ("dev", "validation"):
        assert load(tmp_path, name)[0] == ["c"]
    write(tmp_path / "more.jsonl", "d")
    with pytest.raises(DataError, match=r"contains a split, but that of more\.jsonl does not"):
        load(tmp_path)


def test_test_files_are_never_trained_on(tmp_path: Path) -> None:
    for name in ("train_north", "test_north", "south.train", "south.test"):
        write(tmp_path / f"{name}.jsonl", name)
    assert load(tmp_path)[0] == ["south.train", "train_north"]
    assert load(tmp_path, "test")[0] == ["south.test", "test_north"]
    write(tmp_path / "train" / "test.jsonl", "both")
    with pytest.raises(DataError, match=r"train/test\.jsonl: its name contains two splits, test and train"):
        load(tmp_path)


def test_a_data_file_is_no_card_whatever_its_name(tmp_path: Path) -> None:
    write(tmp_path / "citations.jsonl", "a")
    write(tmp_path / "license_questions.jsonl", "b")
    (tmp_path / "notices.csv").write_text("prompt,completion\nc,1\n")
    for name in ("README.md", "LICENSE", "LICENSE.txt", "NOTICE", "CITATION.cff", ".h.jsonl"):
        (tmp_path / name).write_text("x")
    write(tmp_path / ".hid" / "x.jsonl", "x")
    found, (said,) = load(tmp_path)
    assert found == list("abc")
    assert said.endswith("not read: .h.jsonl, .hid, CITATION.cff, LICENSE, LICENSE.txt, NOTICE, README.md")
    for name in ("citations.jsonl", "license_questions.jsonl", "notices.csv"):
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match=r"contains no data files \(but \.h\.jsonl, \.hid, CITATION"):
        load(tmp_path)


def test_what_cannot_be_looked_into_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    with pytest.raises(DataError, match=r"rows: contains no data files; accepted: .jsonl"):
        load(tmp_path / "rows")
    write(tmp_path / "elsewhere" / "b.jsonl", "b")
    write(tmp_path / "rows" / "a.jsonl", "a")
    (tmp_path / "rows" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="link: a link to a directory"):
        load(tmp_path / "rows")


def test_an_empty_file_among_others_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "a")
    write(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl: has no rows"):
        load(tmp_path)
