"""Atomic writes of files and directories."""

import os
import shutil
from pathlib import Path


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
