"""Atomic writes of files and directories."""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from fedrouter.errors import ConfigError


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
    with os.fdopen(os.open(partial, flags, mode), "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def partial_directory(path: Path) -> Path:
    """Make an empty directory beside ``path``; rename it to ``path`` once it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial
