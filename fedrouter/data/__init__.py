"""Records from files, directories of files, saved data sets, the Hugging Face hub or the built-in tasks.

readers.py   JSON Lines, JSON, CSV, TSV, also gzipped; values unchanged, errors with line numbers
tables.py    Parquet, saved data sets, the hub
files.py     the data files of a directory
forms.py     row → record
messages.py  conversation → turns
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.data.files import ACCEPTED, KINDS, PARQUET, data_files
from fedrouter.data.forms import IN_COMMAND, IN_CONFIG, IN_SITE, NAMES, Reading
from fedrouter.data.readers import Row, read_rows, suffix_of
from fedrouter.data.tables import hub_rows, is_saved, parquet_rows, refuse_split, saved_rows
from fedrouter.errors import ConfigError, DataError
from fedrouter.types import Record

__all__ = [
    "IN_COMMAND",
    "IN_CONFIG",
    "IN_SITE",
    "NAMES",
    "Read",
    "Reading",
    "builtin_records",
    "load_records",
    "read_source",
]

BUILTIN_RECORDS = {"builtin:four-tasks": TASKS}
LOG = logging.getLogger("fedrouter.data")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Read:
    """The records of one file (or data set)."""

    source: str
    records: list[Record]
    reading: Reading  # its forms and unread fields


def load_records(
    source: str,
    split: str | None = None,
    fields: Mapping[str, str] | None = None,
    ignore: Collection[str] = (),
    say: Say = LOG.warning,
    default: str = "train",
    options: tuple[str, str | None] = IN_CONFIG,
) -> list[Record]:
    """Read records from a file, a directory, a saved data set or the Hugging Face hub.

    Parameters
    ----------
    source : str
        A ``.jsonl``, ``.ndjson``, ``.json``, ``.csv`` or ``.tsv`` file, also with ``.gz``; a ``.parquet``
        file; a directory of such files; or a hub id.
    split : str, optional
        Split of a source that has splits; by default ``default``, the only one that a source without splits
        has.
    fields : mapping, optional
        Field of a form → the file's name for it.
    ignore : collection of str
        Fields to skip without a warning.
    say : callable
        Gets a line on each file's unread fields and on skipped files.
    options : tuple
        Names of ``fields`` and ``ignore`` for the user.

    Raises
    ------
    DataError
        If the source is missing, empty or unreadable, or a row cannot be used; names file and row.
    """
    return [
        r for read in read_source(source, split, fields, ignore, say, default, options) for r in read.records
    ]


def read_source(
    source: str,
    split: str | None = None,
    fields: Mapping[str, str] | None = None,
    ignore: Collection[str] = (),
    say: Say = LOG.warning,
    default: str = "train",
    options: tuple[str, str | None] = IN_CONFIG,
) -> list[Read]:
    """Read a source as ``load_records`` does, file by file."""
    if unknown := [name for name in fields or {} if name not in NAMES]:
        raise ConfigError(f"{options[0]}{unknown[0]}: not a field of any form; known: {', '.join(NAMES)}")
    reads: list[Read] = []
    for name, rows in _parts(source, split, say, default):
        reading = Reading(fields or {}, frozenset(ignore), options)
        records = [reading.record(where, row) for where, row in rows]
        for line in reading.done(name):
            say(line)
        if not records:
            raise DataError(f"{name}: has no rows; give a data set with at least one row")
        reads.append(Read(name, records, reading))
    return reads


def builtin_records(name: str, split: str, num_per_task: int, seed: int) -> list[Record]:
    """Generate a built-in data set, task after task; ``split`` is ``train`` or ``test``.

    Raises
    ------
    ConfigError
        If there is no built-in data set of this name, or it has no such split.
    """
    if name not in BUILTIN_RECORDS:
        raise ConfigError(f"unknown built-in data set {name!r}: choose one of {', '.join(BUILTIN_RECORDS)}")
    if split not in ("train", "test"):
        raise ConfigError(f"{name} has no split {split!r}: choose train or test")
    known = cast(Literal["train", "test"], split)
    return [record for task in BUILTIN_RECORDS[name] for record in generate(task, known, num_per_task, seed)]


def names_file(source: str) -> bool:
    """Return whether a source is a file or directory, though it may not exist; others are hub ids."""
    path = Path(source).expanduser()
    return path.exists() or suffix_of(path) in KINDS or source.startswith(("/", "./", "../", "~"))


def _parts(source: str, split: str | None, say: Say, default: str) -> Iterator[tuple[str, Iterator[Row]]]:
    """Yield name and rows of each file of a source."""
    path = Path(source).expanduser()
    if path.is_dir():
        if is_saved(path):
            yield source, saved_rows(path, split, say, default)
            return
        for file in data_files(path, split, say, default):
            yield str(file), _file_rows(file)
        return
    if names_file(source):
        if path.exists() and suffix_of(path) not in KINDS:
            raise DataError(f"{source}: unknown file type; accepted: {ACCEPTED}")
        if not path.exists():
            raise DataError(f"{source}: no such file or directory")
        refuse_split(source, split, default)
        yield str(path), _file_rows(path)
        return
    yield source, hub_rows(source, split, say, default)


def _file_rows(path: Path) -> Iterator[Row]:
    return parquet_rows(path) if suffix_of(path) == PARQUET else read_rows(path)
