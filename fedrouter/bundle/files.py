"""Files of a directory that somebody else has filled: nothing outside it, plain files, bounded in size."""

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
SHOWN = 120  # characters of somebody else's text that a message repeats


@contextmanager
def opened(root: Path, name: str, limit: int, sha256: str | None = None) -> Iterator[BinaryIO]:
    """Open a file of ``root`` to read it from its beginning.

    Parameters
    ----------
    limit : bytes; a larger file is refused before any of it is read.
    sha256 : hex digest of the content; None where nothing is recorded.

    Raises
    ------
    BundleError
        If it is missing, lies elsewhere once links are followed, is no plain file, too large or another.
    """
    path = root / name
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(root.resolve()):
            raise _leads_out(path, root)
        _check_plain(path, real.stat(), limit)
        # What has become a FIFO or a link since is neither waited for nor followed.
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
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, a name too long, NUL in it
        reason = getattr(error, "strerror", None) or error
        raise BundleError(f"{shown(str(path))}: cannot be read: {reason}; copy the bundle again") from error


def read(root: Path, name: str, limit: int, sha256: str | None = None) -> bytes:
    """Return the content of a file of ``root``; see ``opened``."""
    with opened(root, name, limit, sha256) as file:
        return file.read(limit)


def check_links(root: Path) -> None:
    """Refuse a directory in which a link leads out of it, also one that is not read: ``push`` sends some.

    Raises
    ------
    BundleError
        If there is one, three levels deep: what a bundle has.
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
    """Return somebody else's text as a message may repeat it: printable, on one line, not too long."""
    line = text if isinstance(text, str) else repr(text)
    line = line if line.isprintable() else ascii(line)
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}…"


def first_problem(error: ValidationError) -> str:
    """Return the first thing that is wrong, on one line: where, what, and what stands there."""
    found = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in found["loc"])
    what = found["msg"].removeprefix("Value error, ")
    value = "" if isinstance(found["input"], dict | list | tuple) else f", not {shown(repr(found['input']))}"
    return f"{shown(where)}: {shown(what)}{value}" if where else shown(what)


def _check_plain(path: Path, status: os.stat_result, limit: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path}: no plain file; copy the bundle again")
    if status.st_size > limit:
        raise BundleError(f"{path}: {status.st_size} bytes, more than the {limit} that are read of it")


def _leads_out(path: Path, root: Path) -> BundleError:
    return BundleError(
        f"{shown(str(path))}: a link that leads out of {root}; copy the files themselves there (cp -rL)"
    )
