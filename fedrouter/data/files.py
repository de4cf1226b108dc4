"""The data files of a directory; every file is read, reported as skipped, or refused by name."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from fedrouter.data.readers import TEXT_SUFFIXES, suffix_of
from fedrouter.data.tables import SAVED, refuse_split
from fedrouter.errors import DataError

PARQUET = ".parquet"
KINDS = (*TEXT_SUFFIXES, PARQUET)
ACCEPTED = ", ".join(suffix for suffix in KINDS if not suffix.endswith(".gz")) + ", all but the last also .gz"

# The first or last word of a file's or folder's name may be a split: train.jsonl, dev/…, north_test.csv,
# test-00000-of-00002.parquet.
WORDS = re.compile(r"[-_.\s]")
SPLITS = {
    **{name: name for name in ("train", "test", "validation")},
    **dict.fromkeys(("valid", "val", "dev"), "validation"),
    "eval": "test",
}
# Files without data: hidden files, cards, licences, metadata of the hub and of ``datasets``.
BESIDE = re.compile(
    r"\..+|.*\.md|(readme|licen[cs]e|notice|citation)([-_]\w*)?(\.(txt|rst|cff|bib|html))?|dataset_infos?\.json",
    re.IGNORECASE,
)


def data_files(
    directory: Path, split: str | None, say: Callable[[str], None], default: str = "train"
) -> list[Path]:
    """Return the data files in a directory and its subdirectories, sorted.

    If the files' names contain splits, only the files of ``split`` are returned.

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
        found = f" (but {', '.join(str(f.relative_to(directory)) for f in beside)})" if beside else ""
        raise DataError(f"{directory}: contains no data files{found}; accepted: {ACCEPTED}")
    splits = {file: _split_of(directory, file) for file in files}
    named = sorted({name for name in splits.values() if name})
    if named and None in splits.values():
        some, other = (
            next(f for f, s in splits.items() if bool(s) == is_split) for is_split in (True, False)
        )
        raise DataError(
            f"{directory}: the name of {some.name} contains a split, but that of {other.name} does not; "
            "name all files after splits, or none"
        )
    if not named:
        refuse_split(str(directory), split, default)
    given = split or default
    wanted = SPLITS.get(given.lower(), given)
    if named and wanted not in named:
        raise DataError(f"{directory}: no split {given!r}; it has {', '.join(named)}")
    read = [file for file, name in splits.items() if not named or name == wanted]
    doubtful = [f.name for f in read if not named and {SPLITS.get(w) for w in _words(f)} - {None, wanted}]
    if doubtful:
        say(
            f"{directory}: read like the others, though a split occurs in the name: {', '.join(doubtful)}; "
            "a split is recognised as the first or last word of a name"
        )
    others = [str(f.relative_to(directory)) for f in (*files, *beside) if f not in read]
    if others:
        say(f"{directory}: not read: {', '.join(others)}" + (f" (split {given})" if named else ""))
    return read


def _all_files(directory: Path) -> tuple[list[Path], list[Path]]:
    """Return the files that should contain data; those matching ``BESIDE``, and hidden directories."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error

    data: list[Path] = []
    beside: list[Path] = []
    for folder, folders, names in os.walk(directory, onerror=refuse):
        for name in list(folders):
            if name.startswith("."):
                folders.remove(name)  # .git, .cache
                beside.append(Path(folder) / name)
            elif (Path(folder) / name).is_symlink():
                raise DataError(f"{Path(folder) / name}: a link to a directory; give its target as a source")
        if Path(folder) != directory and any(name in SAVED for name in names):
            raise DataError(f"{folder}: a saved data set in a data directory; give it as a source of its own")
        for name in names:
            (beside if BESIDE.fullmatch(name) else data).append(Path(folder) / name)
    return sorted(data), sorted(beside)


def _split_of(directory: Path, file: Path) -> str | None:
    """Return the split in the name of a file or its folders, by the split names of ``datasets``."""
    names = [_words(Path(part)) for part in file.relative_to(directory).parts]
    found = {SPLITS[word] for words in names for word in (words[0], words[-1]) if word in SPLITS}
    if len(found) > 1:
        raise DataError(f"{file}: its name contains two splits, {' and '.join(sorted(found))}; rename it")
    return found.pop() if found else None


def _words(file: Path) -> list[str]:
    return WORDS.split(file.name.lower().removesuffix(suffix_of(file)))
