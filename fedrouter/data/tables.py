"""Rows of Parquet files, saved data sets and the hub, read with Arrow and Hugging Face datasets.

Of the typed cells, only integers and class labels are converted to text, which loses nothing. Only data from
the hub is cached.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedrouter.data.readers import Row
from fedrouter.errors import DataError, first_line

SAVED = ("state.json", "dataset_dict.json")  # files written by ``save_to_disk``


def is_saved(path: Path) -> bool:
    """Return whether a directory is a saved data set."""
    return any((path / name).exists() for name in SAVED)


def refuse_split(source: str, split: str | None, default: str) -> None:
    """Refuse any split but the default one of a source that has no splits."""
    if split not in (None, default):
        raise DataError(f"{source}: no split {split!r}: it has no splits; remove the setting split")


def parquet_rows(path: Path) -> Iterator[Row]:
    """Yield (file row N, row), N from 1."""
    import pyarrow as pa  # type: ignore[import-untyped]
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from pyarrow import parquet

    try:
        data = Dataset(InMemoryTable(parquet.read_table(path)))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: not readable as Parquet: {_reason(error)}") from error
    yield from _rows(str(path), data)


def saved_rows(
    path: Path, split: str | None, say: Callable[[str], None], default: str = "train"
) -> Iterator[Row]:
    """Yield the rows of a data set written by ``save_to_disk``; report its other splits and other files."""
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path}: {_reason(error)}") from error
    if isinstance(data, dict):
        parts = data
        if (split or default) not in parts:
            raise DataError(f"{path}: no split {split or default!r}; it has {', '.join(parts)}")
    else:
        parts = {default: data}
        refuse_split(str(path), split, default)
    data = parts[split or default]
    own = {Path(file["filename"]).resolve() for part in parts.values() for file in part.cache_files}
    unread = [_split(name, len(part)) for name, part in parts.items() if part is not data]
    unread += [
        str(file.relative_to(path))
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.resolve() not in own and file.name not in (*SAVED, "dataset_info.json")
    ]
    if unread:
        say(f"{path}: not read: {', '.join(unread)}")
    yield from _rows(str(path), data)


def hub_rows(
    source: str, split: str | None, say: Callable[[str], None], default: str = "train"
) -> Iterator[Row]:
    """Yield the rows of a data set on the Hugging Face hub; report its other splits."""
    import datasets

    try:
        data = datasets.load_dataset(source, split=split or default)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source}: neither a file or directory nor a usable data set on the hub: {_reason(error)}"
        ) from error
    say(f"{source}: its rows are cached in {datasets.config.HF_DATASETS_CACHE}, like all data from the hub")
    others = {name: its for name, its in (data.info.splits or {}).items() if name != str(data.split)}
    if others:
        unread = ", ".join(_split(name, its.num_examples) for name, its in others.items())
        say(f"{source}: not read: {unread}")
    yield from _rows(source, data)


def _split(name: str, num_rows: int) -> str:
    return f"split {name} ({num_rows} rows)"


def _rows(source: str, data: Any) -> Iterator[Row]:
    from datasets import ClassLabel

    labels = {name: kind for name, kind in data.features.items() if isinstance(kind, ClassLabel)}
    for number, row in enumerate(data, start=1):
        for name, kind in labels.items():
            if row[name] is not None and row[name] >= 0:
                row[name] = kind.int2str(row[name])
        yield f"{source} row {number}", {name: _cell(value) for name, value in row.items()}


def _cell(value: Any) -> Any:
    """Return integers as text, and structs without the keys that Arrow filled with None."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _without_none(value)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _reason(error: Exception) -> str:
    """Return one line, from the cause if there is one: datasets hides reasons there."""
    reason = error.__cause__ or error
    return first_line(reason)
