"""Records from JSON Lines files, Hugging Face data sets or the built-in tasks.

A row has one of these forms, tried in this order, and may have a ``task`` label:

- ``messages``: a chat that ends with the assistant's answer
- ``prompt``, ``completion``
- ``instruction``, ``response`` (or ``output``), optionally ``input``
"""

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.errors import ConfigError, DataError
from fedrouter.partition import partition
from fedrouter.types import Record, Turn

__all__ = ["builtin_records", "is_label", "load_records", "partition"]

BUILTIN_RECORDS = {"builtin:four-tasks": TASKS}
FORMS = "messages, prompt + completion, or instruction + response (or output), optionally with input"

MAX_LABEL = 200  # characters

_READERS = {".json": "json", ".csv": "csv", ".parquet": "parquet"}
_ROLES = ("system", "user", "assistant")


def load_records(source: str, split: str | None = None, limit: int | None = None) -> list[Record]:
    """Read records from a file, a saved data set or the Hugging Face hub.

    Parameters
    ----------
    source : str
        A ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, a directory, or a hub id.
    split : str, optional
        Of a data set that has splits; ``train`` unless given. Single files have none.
    limit : int, optional
        Read that many rows from the beginning; what follows is not checked.

    Raises
    ------
    DataError
        If the source is missing, empty or unreadable, or a row has none of the forms above; names the row.
    """
    path = Path(source).expanduser()
    is_jsonl = path.suffix == ".jsonl" and not path.is_dir()
    rows = _jsonl_rows(path) if is_jsonl else _dataset_rows(source, path, split)
    records = [_record(where, row) for where, row in islice(rows, limit)]
    if not records:
        raise DataError(f"{source}: has no rows; give a data set with at least one")
    return records


def is_label(text: str) -> bool:
    """Return whether a text can name a task or a client: printable, on one line, not too long."""
    return text.isprintable() and 0 < len(text) <= MAX_LABEL


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


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (file:line, row); our own reader, for exact line numbers. Blank lines are skipped."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if text.strip():
                    yield f"{path}:{number}", _parse(f"{path}:{number}", text)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _parse(where: str, line: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for key, value in pairs:
            if key in row:
                raise DataError(f"{where}: a field appears twice: {key}")
            row[key] = value
        return row

    def refuse(constant: str) -> None:
        raise DataError(f"{where}: {constant} is not JSON; use null or leave the field out")

    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON: {error.msg} (column {error.colno}); expected one object a line"
        ) from error
    except (ValueError, RecursionError) as error:  # a number too long, nesting too deep
        raise DataError(f"{where}: not usable JSON: {error}") from error


def _dataset_rows(source: str, path: Path, split: str | None) -> Iterator[tuple[str, Any]]:
    """Yield (source row N, row), N from 1, through Hugging Face datasets."""
    import datasets

    reader = _READERS.get(path.suffix)
    if not path.exists() and (reader or source.startswith(("/", "./", "../", "~"))):
        raise DataError(f"{source}: no such file or directory")
    try:
        if path.is_dir() and any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            data = datasets.load_from_disk(str(path))
            if isinstance(data, dict):
                if (split or "train") not in data:
                    raise DataError(f"{source}: no split {split or 'train'!r}; it has {', '.join(data)}")
                data = data[split or "train"]
        elif path.is_file():
            if reader is None:
                raise DataError(f"{source}: unknown kind of file; accepted: .jsonl, {', '.join(_READERS)}")
            data = datasets.load_dataset(reader, data_files=str(path), split="train")
        else:
            data = datasets.load_dataset(str(path) if path.is_dir() else source, split=split or "train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        place = "" if path.exists() else "no such file or directory, and no data set that the hub can give: "
        raise DataError(f"{source}: {place}{_reason(error)}") from error
    return ((f"{source} row {number}", row) for number, row in enumerate(data, start=1))


def _reason(error: Exception) -> str:
    """Return one line; "an error occurred while generating the dataset" hides the reason in its cause."""
    reason = error.__cause__ or error
    return (str(reason).strip() or type(reason).__name__).splitlines()[0]


def _record(where: str, row: Any) -> Record:
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: expected an object with fields, found {type(row).__name__}; accepted: {FORMS}"
        )
    given = {key: value for key, value in row.items() if value is not None}
    task = _text(where, given, "task") if "task" in given else None
    if task is not None and not is_label(task):
        raise DataError(
            f"{where}: field task must be printable text on one line, of up to {MAX_LABEL} characters"
        )
    if "messages" in given:
        turns = _turns(where, given["messages"])
        return Record(turns[:-1], turns[-1].content, task)
    if "prompt" in given and "completion" in given:
        return Record((Turn("user", _text(where, given, "prompt")),), _text(where, given, "completion"), task)
    answer = next((name for name in ("response", "output") if name in given), None)
    if "instruction" in given and answer:
        prompt = _text(where, given, "instruction")
        if given.get("input", "") != "":
            prompt += "\n\n" + _text(where, given, "input")
        return Record((Turn("user", prompt),), _text(where, given, answer), task)
    found = ", ".join(given) or "none"
    raise DataError(f"{where}: missing fields: found {found}; accepted: {FORMS}")


def _turns(where: str, messages: Any) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{where}: messages must be a list of objects with role and content")
    turns = []
    for number, message in enumerate(messages, start=1):
        role = message.get("role")
        if role not in _ROLES:
            raise DataError(f"{where}: message {number} has role {role!r}; accepted: {', '.join(_ROLES)}")
        turns.append(Turn(role, _text(f"{where}: message {number}", message, "content")))
    if [turn.role for turn in turns[-2:]] != ["user", "assistant"]:
        raise DataError(f"{where}: messages must end with a user turn and the assistant's answer")
    return tuple(turns)


def _text(where: str, row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name} must be text, found {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{where}: field {name} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(
            f"{where}: field {name} holds half a character (a lone surrogate); save it as UTF-8 text"
        )
    return value
