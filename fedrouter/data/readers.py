"""Rows of JSON Lines, JSON arrays, CSV and TSV, gzipped or not; values unchanged, errors with line numbers.

Types are not inferred, nothing is cached. tables.py reads Parquet, saved data sets and the hub.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fedrouter.errors import DataError

Row = tuple[str, Any]  # place (file:line) and value, which should be an object

MAX_CELL = 2**31 - 1  # characters; the csv module's default limit is too low for long chats


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of one text file; the suffix is its type.

    Raises
    ------
    DataError
        If the file is missing, damaged, not UTF-8 or not of its type; names the line.
    """
    try:
        with _opened(path) as file:
            yield from READERS[suffix_of(path).removesuffix(".gz")](path, file)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def suffix_of(path: Path) -> str:
    """Return a file's suffix in lower case, ``.gz`` with the one before it."""
    return "".join(path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]).lower()


def _opened(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    return path.open("rb")


def _lines(path: Path, file: BinaryIO) -> Iterator[Row]:
    """Read one object per line; skip blank lines."""
    for number, line in enumerate(file, start=1):
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if text.strip():
            where = f"{path}:{number}"
            try:
                decoded = text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where}: not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
                ) from error
            yield where, _parsed(where, decoded, "one object per line")[0]


def _array(path: Path, file: BinaryIO) -> Iterator[Row]:
    """Read a list of objects, or JSON Lines if the file begins with an object."""
    raw = file.read()
    if raw.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{":
        yield from _lines(path, io.BytesIO(raw))
        return
    text = _decoded(path, raw)
    at = _skip(text, 0)
    if text[at : at + 1] != "[":
        if at == len(text):
            return
        raise DataError(f"{path}:{_line(text, at)}: expected a list of objects, or one object per line")
    at, line, counted, number = _skip(text, at + 1), 1, 0, 0
    if text[at : at + 1] == "]":
        at = _skip(text, at + 1)
    else:
        while True:
            number += 1
            line, counted = line + text.count("\n", counted, at), at
            where = f"{path}:{line} (row {number})"
            row, at = _parsed(where, text, "a list of objects", at)
            yield where, row
            at = _skip(text, at)
            mark, at = text[at : at + 1], _skip(text, at + 1)
            if mark == "]":
                break
            if mark != ",":
                found = f"found {mark!r}" if mark else "the file ends"
                raise DataError(f"{where}: not JSON: {found} after this row, expected , or ]")
    if at < len(text):
        raise DataError(f"{path}:{_line(text, at)}: not JSON: the file continues after the list")


def _delimited(delimiter: str) -> Callable[[Path, BinaryIO], Iterator[Row]]:
    def read(path: Path, file: BinaryIO) -> Iterator[Row]:
        """Read a header, then rows with the same number of cells; skip blank lines."""
        csv.field_size_limit(MAX_CELL)
        lines = io.StringIO(_decoded(path, file.read()), newline="")
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] = []
        number, line = 0, 1
        try:
            for cells in rows:
                start, line = line, rows.line_num + 1
                if not cells:
                    continue
                if not header:
                    header = _header(f"{path}:{start}", cells, delimiter)
                    continue
                number += 1
                where = f"{path}:{start} (row {number})"
                if len(cells) != len(header):
                    raise DataError(
                        f"{where}: {len(cells)} fields, but the header has {len(header)} "
                        f"({', '.join(header)}); put fields that contain a {_name(delimiter)} or a line "
                        "break in double quotes"
                    )
                yield where, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}:{line} (row {number + 1}): not {_kind(delimiter)}: {error}") from error

    return read


def _header(where: str, cells: list[str], delimiter: str) -> list[str]:
    other = next((d for d in ";\t,|" if len(cells) == 1 and d in cells[0] and d != delimiter), None)
    if other:
        name = json.dumps(cells[0], ensure_ascii=False)
        raise DataError(
            f"{where}: the header is one field, {name}: {_kind(delimiter)} "
            f"separates fields by a {_name(delimiter)}, not by {json.dumps(other)}; save the file with one"
        )
    names = [cell.strip() or f"column {i}" for i, cell in enumerate(cells, start=1)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise DataError(f"{where}: the header names a field twice: {twice}")
    return names


def _kind(delimiter: str) -> str:
    return "CSV" if delimiter == "," else "TSV"


def _name(delimiter: str) -> str:
    return "comma" if delimiter == "," else "tab"


def _decoded(path: Path, raw: bytes) -> str:
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        column = error.start - error.object.rfind(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{line}: not UTF-8 (byte {column} of the line); save the file as UTF-8"
        ) from error


def _skip(text: str, at: int) -> int:
    """Return the position of the next character that is not JSON white space."""
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def parse_json(where: str, text: str, expected: str) -> Any:
    """Parse the JSON text of a field; see ``_parsed``."""
    return _parsed(where, text, expected)[0]


def _parsed(where: str, text: str, expected: str, at: int | None = None) -> tuple[Any, int]:
    """Parse the JSON value at position ``at`` (None: all of ``text``); return it and its end position."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise DataError(f"{where}: a field appears twice: {twice}")
        return row

    def refuse(constant: str) -> None:
        raise DataError(f"{where}: {constant} is not JSON; use null or leave the field out")

    decoder = json.JSONDecoder(object_pairs_hook=unique, parse_constant=refuse)
    try:
        return (decoder.decode(text), len(text)) if at is None else decoder.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON: {error.msg} (column {error.colno}); expected {expected}"
        ) from error
    except (ValueError, RecursionError) as error:  # too long a number, too deep nesting
        raise DataError(f"{where}: not usable JSON: {error}") from error


READERS: dict[str, Callable[[Path, BinaryIO], Iterator[Row]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _array,
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
}
TEXT_SUFFIXES = (*READERS, *(f"{suffix}.gz" for suffix in READERS))
