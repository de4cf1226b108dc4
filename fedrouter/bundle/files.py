"""Safe reading of files in an untrusted directory: inside it, regular, and bounded in size."""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from fedrouter.errors import BundleError

MIB = 1 << 20
SHOWN = 120  # characters of untrusted text that an error message may quote


@contextmanager
def opened(root: Path, name: str, limit: int, sha256: str | None = None) -> Iterator[BinaryIO]:
    """Open a file below ``root`` for reading.

    Parameters
    ----------
    limit : maximum size in bytes, checked before the file is read.
    sha256 : expected hex digest of the content; None: not checked.

    Raises
    ------
    BundleError
        If the file is missing, outside ``root`` after links are resolved, not a regular file, too large, or
        has another hash.
    """
    path = root / name
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(root.resolve()):
            raise _leads_out(path, root)
        _check_plain(path, real.stat(), limit)
        # A FIFO or link that has replaced the file since then must not block or be followed.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        with os.fdopen(os.open(real, flags), "rb") as file:
            _check_plain(path, os.fstat(file.fileno()), limit)
            if sha256 is not None:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise BundleError(
                        f"{path}: content differs from what the manifest records; copy the bundle again"
                    )
                file.seek(0)
            yield file
    except FileNotFoundError as error:
        raise BundleError(f"{path}: no such file; copy the bundle again") from error
    except (OSError, RuntimeError, ValueError) as error:  # also a link to itself, too long a name, NUL in it
        reason = getattr(error, "strerror", None) or error
        raise BundleError(f"{shown(str(path))}: cannot be read: {reason}; copy the bundle again") from error


def read(root: Path, name: str, limit: int, sha256: str | None = None) -> bytes:
    """Return the content of a file below ``root``; see ``opened``."""
    with opened(root, name, limit, sha256) as file:
        return file.read(limit)


def check_links(root: Path) -> None:
    """Refuse a directory with a link that leads out of it; ``push`` uploads files that are not read before.

    Raises
    ------
    BundleError
        If there is such a link in the top three levels, which are all that a bundle has.
    """
    home = root.resolve()
    for path in (path for level in ("*", "*/*", "*/*/*") for path in root.glob(level)):
        if path.is_symlink():
            try:
                inside = path.resolve().is_relative_to(home)
            except (OSError, RuntimeError):  # a link to itself
                inside = False
            if not inside:
                raise _leads_out(path, root)


def shown(text: object) -> str:
    """Return untrusted text in a form safe for messages: printable, on one line, truncated."""
    line = text if isinstance(text, str) else repr(text)
    line = line if line.isprintable() else ascii(line)
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}…"


def first_problem(error: ValidationError) -> str:
    """Return a validation's first error on one line: place, problem and value."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    problem = first["msg"].removeprefix("Value error, ")
    value = "" if isinstance(first["input"], dict | list | tuple) else f", not {shown(repr(first['input']))}"
    return f"{shown(where)}: {shown(problem)}{value}" if where else shown(problem)


def _check_plain(path: Path, status: os.stat_result, limit: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path}: not a regular file; copy the bundle again")
    if status.st_size > limit:
        raise BundleError(f"{path}: {status.st_size} bytes, more than the limit of {limit}")


def _leads_out(path: Path, root: Path) -> BundleError:
    return BundleError(
        f"{shown(str(path))}: a link that leads out of {root}; copy the bundle without links (cp -rL)"
    )
