"""Files of runs: atomic writes, checked directories, JSON that names the file if it is damaged."""

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from fedrouter.errors import ConfigError, DataError, first_line

Value = TypeVar("Value")


def check_directory(path: Path, name: str) -> None:
    """Check that a directory can be written, or made; leave nothing behind.

    Parameters
    ----------
    name : the setting or option that gave the directory, for the error message.

    Raises
    ------
    ConfigError
        If it cannot.
    """
    try:
        with suppress(FileNotFoundError):
            path.stat()  # finds a name that is too long, a file among the parents …
        existing = path.absolute()
        while not os.path.lexists(existing):
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigError(
            f"{name} {path}: cannot be written: {error.strerror}; choose another one"
        ) from error


def write_atomically(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Write a file under a temporary name, then rename it.

    Parameters
    ----------
    mode : permissions that the file is created with; the umask still applies.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # it may be a link, or left over from a killed run
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    try:
        with os.fdopen(os.open(partial, flags, mode), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise a ConfigError that names ``path`` in place of an OSError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another place") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise a DataError that names ``path`` in place of an OSError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror}; restore or remove it") from error


def partial_directory(path: Path) -> Path:
    """Make an empty directory beside ``path``; rename it to ``path`` once it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def read_json(file: Path) -> Any:
    """Return the value in a JSON file of a run.

    Raises
    ------
    DataError
        If the file cannot be read, or is damaged.
    """
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: cannot be read as JSON: {first_line(error)}; restore or remove it"
        ) from error


def read_map(file: Path, kind: type[Value]) -> dict[str, Value]:
    """Return the JSON object in a file of ours, whose values are all of one kind; empty without the file.

    Raises
    ------
    DataError
        If the file cannot be read, or is damaged.
    """
    found = read_json(file) if file.exists() else {}
    if not isinstance(found, dict) or any(type(value) is not kind for value in found.values()):
        raise DataError(
            f"{file}: damaged: expected an object of {kind.__name__} values; restore or remove it"
        )
    return found


def read_secret(file: Path) -> bytes:
    """Return the secret in a file of ours.

    Raises
    ------
    DataError
        If the file cannot be read, or is damaged.
    """
    with reading(file):
        content = file.read_bytes()
    try:
        secret = bytes.fromhex(content.decode())
    except ValueError:  # its text would quote the secret
        secret = b""
    if len(secret) != 32:
        raise DataError(
            f"{file}: damaged: expected 64 hex digits; restore it, or remove it and start a new run"
        )
    return secret


def read_json_lines(
    file: Path, *keys: str, more: Mapping[str, Collection[str]] | None = None
) -> list[dict[str, Any]]:
    """Return the objects in a JSON Lines file of ours.

    Parameters
    ----------
    keys : keys of every object.
    more : keys of an object that has a certain key.

    Raises
    ------
    DataError
        If the file cannot be read, or a line is damaged; names file and line.
    """
    with reading(file):
        lines = file.read_bytes().splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise DataError(f"{file}:{number}: damaged: expected a JSON object; remove the line")
        wanted = {*keys, *(name for key, names in (more or {}).items() if key in value for name in names)}
        if missing := sorted(wanted - value.keys()):
            raise DataError(f"{file}:{number}: damaged: lacks {', '.join(missing)}; remove the line")
        found.append(value)
    return found
