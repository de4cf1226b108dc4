"""The clients' rows: what a limit leaves out is read and named."""

import json
from pathlib import Path

import pytest

from fedrouter.config import Config, DataSettings
from fedrouter.errors import DataError
from fedrouter.train.client.sources import read_clients


def write(file: Path, num_rows: int) -> Path:
    file.parent.mkdir(exist_ok=True)
    rows = [{"prompt": f"question {i}", "completion": "yes"} for i in range(num_rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_rows_beyond_the_limit_are_read_and_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / "two" / f"{name}.jsonl", 10)
    config = Config(data=DataSettings(clients={"c": str(tmp_path / "two")}, max_per_client=5))
    said: list[str] = []
    records, reads = read_clients(config, said.append)
    assert [row.turns[0].content for row in records["c"]] == [f"question {i}" for i in range(5)]
    assert [len(read.records) for read in reads] == [10, 10]
    assert said == ["client c: 15 of 20 rows are used by nobody: data.max_per_client limits them"]
    with (tmp_path / "two" / "b.jsonl").open("a") as file:
        file.write("not JSON\n")
    with pytest.raises(DataError, match=r"b\.jsonl:11: not JSON"):
        read_clients(config)


def test_a_limit_below_the_smallest_group_is_named_with_the_rows_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", 20)
    config = Config(data=DataSettings(clients={"a": str(file)}, max_per_client=4))
    with pytest.raises(
        DataError, match=r"client a: data.max_per_client = 4 leaves it 4 of 20 rows in .*a.jsonl"
    ):
        read_clients(config)
    write(file, 4)
    with pytest.raises(DataError, match=r"client a: 4 rows in .*a.jsonl; with privacy.min_cluster_size = 5"):
        read_clients(config)


def test_built_in_rows_are_listed_like_a_file(tmp_path: Path) -> None:
    file = str(write(tmp_path / "a.jsonl", 20))
    source = [file, "builtin:four-tasks"]
    config = Config(data=DataSettings(source=source, partition="iid", num_clients=4, num_per_task=5))
    records, reads = read_clients(config, pytest.fail)
    assert [(read.source, read.reading.num_rows) for read in reads] == [
        (file, 20),
        ("builtin:four-tasks", 20),
    ]
    assert sum(map(len, records.values())) == 40
