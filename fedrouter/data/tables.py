"""Rows of Parquet files, saved data sets and the hub, through Arrow and Hugging Face datasets.

Their cells have types. A cell becomes text only where that loses nothing: text, whole numbers, and the names
of class labels. Local files are read where they lie; only what comes from the hub is kept in a cache.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedrouter.data.readers import Row
from fedrouter.errors import DataError, first_line

SAVED = ("state.json", "dataset_dict.json")  # what ``save_to_disk`` leaves in its directory


def is_saved(path: Path) -> bool:
    """Tell whether a directory holds a saved data set."""
    return any((path / name).exists() for name in SAVED)


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


def saved_rows(path: Path, split: str | None) -> Iterator[Row]:
    """Yield the rows of a data set that ``save_to_disk`` wrote."""
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path}: {_reason(error)}") from error
    if isinstance(data, dict):
        if (split or "train") not in data:
            raise DataError(f"{path}: no split {split or 'train'!r}; it has {', '.join(data)}")
        data = data[split or "train"]
    yield from _rows(str(path), data)


def hub_rows(source: str, split: str | None, say: Callable[[str], None]) -> Iterator[Row]:
    """Yield the rows of a data set on the Hugging Face hub."""
    import datasets

    try:
        data = datasets.load_dataset(source, split=split or "train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source}: no such file or directory, and no data set that the hub can give: {_reason(error)}"
        ) from error
    say(f"{source}: its rows are kept in {datasets.config.HF_DATASETS_CACHE}, as all from the hub")
    yield from _rows(source, data)


def _rows(source: str, data: Any) -> Iterator[Row]:
    from datasets import ClassLabel

    labels = {name: kind for name, kind in data.features.items() if isinstance(kind, ClassLabel)}
    for number, row in enumerate(data, start=1):
        for name, kind in labels.items():
            if row[name] is not None and row[name] >= 0:
                row[name] = kind.int2str(row[name])
        yield f"{source} row {number}", {name: _cell(value) for name, value in row.items()}


def _cell(value: Any) -> Any:
    """Return whole numbers as text, and structs without the keys that Arrow filled with None."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _unfilled(value)


def _unfilled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unfilled(one) for key, one in value.items() if one is not None}
    return [_unfilled(one) for one in value] if isinstance(value, list) else value


def _reason(error: Exception) -> str:
    """Return one line; "an error occurred while generating the dataset" hides the reason in its cause."""
    reason = error.__cause__ or error
    return first_line(reason)
