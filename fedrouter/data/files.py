"""The data files of a directory; every file is read, reported as skipped, or refused by name."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from fedrouter.data.readers import TEXT_SUFFIXES, suffix_of
from fedrouter.data.tables import SAVED
from fedrouter.errors import DataError

PARQUET = ".parquet"
KINDS = (*TEXT_SUFFIXES, PARQUET)
ACCEPTED = ", ".join(suffix for suffix in KINDS if not suffix.endswith(".gz")) + ", all but the last also .gz"

# Names of files and folders that contain a split: train.jsonl, test-00000-of-00002.parquet, dev/…
SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)([-_.]\d.*)?", re.IGNORECASE)
# Files without data: hidden files, cards, licences, metadata of the hub and of ``datasets``.
BESIDE = re.compile(
    r"\.(?!\.).*|(readme|licen[cs]e|notice|citation).*|.*\.md|dataset_infos?\.json", re.IGNORECASE
)


def data_files(directory: Path, split: str | None, say: Callable[[str], None]) -> list[Path]:
    """Return the data files in a directory and its subdirectories, sorted.

    If the files' names contain splits, only the files of ``split`` (by default ``train``) are returned.

    Raises
    ------
    DataError
        If a file's type is unknown, only some names contain a split, or no file is of the wanted split.
    """
    files, beside = _all_files(directory)
    for file in files:
        if suffix_of(file) not in KINDS:
            raise DataError(
                f"{file}: unknown file type in a data directory; move it elsewhere; accepted: {ACCEPTED}"
            )
    if not files:
        raise DataError(f"{directory}: contains no data files; accepted: {ACCEPTED}")
    splits = {file: _split_of(file.relative_to(directory)) for file in files}
    named = sorted({name for name in splits.values() if name})
    if named and None in splits.values():
        some, other = (
            next(f for f, s in splits.items() if bool(s) == is_split) for is_split in (True, False)
        )
        raise DataError(
            f"{directory}: the name of {some.name} contains a split, but that of {other.name} does not; "
            "name all files after splits, or none"
        )
    wanted = split or "train"
    if named and wanted not in named:
        raise DataError(f"{directory}: no split {wanted!r}; it has {', '.join(named)}")
    read = [file for file, name in splits.items() if not named or name == wanted]
    others = [str(f.relative_to(directory)) for f in (*files, *beside) if f not in read]
    if others:
        say(f"{directory}: not read: {', '.join(others)}" + (f" (split {wanted})" if named else ""))
    return read


def _all_files(directory: Path) -> tuple[list[Path], list[Path]]:
    """Return the files that should contain data, and those matching ``BESIDE``."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error

    data: list[Path] = []
    beside: list[Path] = []
    for folder, folders, names in os.walk(directory, onerror=refuse):
        for name in list(folders):
            if name.startswith("."):
                folders.remove(name)  # .git, .cache
            elif (Path(folder) / name).is_symlink():
                raise DataError(f"{Path(folder) / name}: a link to a directory; give its target as a source")
        if Path(folder) != directory and any(name in SAVED for name in names):
            raise DataError(f"{folder}: a saved data set in a data directory; give it as a source of its own")
        for name in names:
            (beside if BESIDE.fullmatch(name) else data).append(Path(folder) / name)
    return sorted(data), sorted(beside)


def _split_of(file: Path) -> str | None:
    """Return the split in the name of a file or its folders, by the split names of ``datasets``."""
    stem = file.name.removesuffix(suffix_of(file))
    found = next((m for m in map(SPLIT.fullmatch, (*file.parts[:-1], stem)) if m), None)
    if found is None:
        return None
    name = found[1].lower()
    return {"valid": "validation", "val": "validation", "dev": "validation", "eval": "test"}.get(name, name)
