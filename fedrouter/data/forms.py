"""Row → record: detection of the row's form, and a count of fields that the form does not use.

The README lists the forms with their fields. ``Reading`` reports the unread fields, so that no data is
dropped silently.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedrouter.data.messages import has_text, listed, shown, text_of, tool_list, turns_of
from fedrouter.errors import DataError
from fedrouter.types import MAX_LABEL, Record, Turn, is_label

PAIRS = (
    ("prompt", "completion"),
    ("instruction", "response"),
    ("instruction", "output"),
    ("prompt", "response"),
    ("prompt", "output"),
    ("instruction", "completion"),
)
NAMES = ("messages", "conversations", "prompt", "completion", "instruction", "response", "output", "input",
         "context", "system", "history", "tools", "functions", "task")  # fmt: skip
FORMS = (
    "messages, prompt + completion, or instruction + response (or output), optionally with input, context, "
    "system, history; conversations; fields of other names must be mapped to these"
)


IN_CONFIG = ("data.fields.", "data.ignore")
IN_SITE = ("fields.", "ignore")
IN_COMMAND = ("--field ", None)


@dataclass
class Reading:
    """Options for reading rows, and statistics of one file.

    Parameters
    ----------
    fields : field of a form → the file's name for it.
    ignore : the file's fields to skip without a warning.
    options : names of these two options for the user: ``IN_CONFIG``, ``IN_SITE`` or ``IN_COMMAND``.
    """

    fields: Mapping[str, str] = field(default_factory=dict)
    ignore: frozenset[str] = frozenset()
    options: tuple[str, str | None] = IN_CONFIG
    num_rows: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)  # rows with text in a field that no form uses
    num_early: int = 0  # rows with an answer before the first user turn
    mapped: set[str] = field(default_factory=set)  # columns of ``fields`` that occurred in a row

    def record(self, where: str, row: Any) -> Record:
        """Convert a row to a record.

        Raises
        ------
        DataError
            If the row has no known form, or a field of its form cannot be used.
        """
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object with fields, found {shown(row)}; accepted: {FORMS}")
        self.num_rows += 1
        ignored = [name for name, value in row.items() if name in self.ignore and value is not None]
        row = {name: value for name, value in row.items() if name not in self.ignore}
        columns = {**{name: name for name in NAMES if name not in self.fields}, **self.fields}
        given = _Given(where, row, {n: c for n, c in columns.items() if row.get(c) is not None})
        self.mapped |= {column for column in self.fields.values() if column in row}
        given.missing = [
            f"{self.options[0]}{name} names {column}, which this row does not have"
            for name, column in self.fields.items()
            if row.get(column) is None and column not in ignored
        ]
        if ignored:
            given.missing.append(f"{self.options[1]} leaves out {', '.join(ignored)}")
        form, record = _formed(given, self.ignore)
        self.forms[form] += 1
        self.num_early += given.early
        self.unread.update(sorted(given.extra - self.ignore))
        self.unread.update(n for n, value in row.items() if n not in given.read and has_text(value))
        return replace(record, where=where)

    def done(self, source: str) -> list[str]:
        """Return one line on the unread fields, and one on answers without loss, if there are any.

        Raises
        ------
        DataError
            If ``fields`` names a column that no row has.
        """
        mapping, ignoring = self.options
        for name, column in self.fields.items():
            if self.num_rows and column not in self.mapped:
                raise DataError(f"{source}: no row has the field {column}, which {mapping}{name} names")
        lines = []
        if self.num_early:
            lines.append(
                f"{source}: {self.num_early} of {self.num_rows} rows begin with the assistant: what it says "
                "before the first user turn carries no loss, because no server generates it"
            )
        if not self.unread:
            return lines
        named = ", ".join(f"{n} ({100 * k / self.num_rows:.3g} % of rows)" for n, k in self.unread.items())
        line = f"{source}: unread fields: {named}; map them with {mapping}NAME"
        if ignoring:
            line += f", or ignore them with {ignoring} = {json.dumps(list(self.unread), ensure_ascii=False)}"
        return [*lines, line]


class _Given:
    """One row's fields by the forms' names; records which of them were read."""

    def __init__(self, where: str, row: Mapping[str, Any], columns: Mapping[str, str]):
        self.where, self._row, self._columns = where, row, columns
        self.read: set[str] = set()
        self.extra: set[str] = set()  # unread keys of messages
        self.early = False  # whether an answer before the first user turn lost its loss
        self.missing: list[str] = []  # settings that keep fields from being found

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def __getitem__(self, name: str) -> Any:
        column = self._columns[name]
        self.read.add(column)
        return self._row[column]

    def text(self, name: str) -> str:
        """Return a field's text; "" without the field."""
        return text_of(self.where, self._columns[name], self[name]) if name in self else ""

    @property
    def found(self) -> str:
        return ", ".join(name for name, value in self._row.items() if value is not None) or "none"


def _formed(given: _Given, ignore: frozenset[str]) -> tuple[str, Record]:
    where = given.where

    def turns(name: str, learned: bool = True) -> list[Turn]:
        values = listed(where, name, given[name])
        return turns_of(where, values, name, given.extra, ignore, learned)

    for name in ("messages", "conversations"):
        if name in given:
            form = "OpenAI messages" if name == "messages" else "ShareGPT"
            return form, _finished(given, turns(name), f"{where}: {name}")
    pair = next((pair for pair in PAIRS if pair[0] in given and pair[1] in given), None)
    if pair is None:
        why = "; ".join([f"found {given.found}", *given.missing])
        raise DataError(f"{where}: missing fields: {why}; accepted: {FORMS}")
    question, answer = pair
    if _is_chat(given[question]) and _is_chat(given[answer]):
        both = [*turns(question, learned=False), *turns(answer)]
        return "conversational prompt-completion", _finished(given, both, f"{where}: {answer}")
    parts = [given.text(name) for name in (question, "input", "context")]
    prompt = "\n\n".join(part for part in parts if part.strip())
    if not prompt:
        raise DataError(f"{where}: field {given._columns[question]} is empty")
    turns_of_pair = [
        *_history(given, ignore),
        Turn("user", prompt),
        Turn("assistant", given.text(answer)),
    ]
    return " + ".join(pair), _finished(given, turns_of_pair, where)


def _history(given: _Given, ignore: frozenset[str]) -> list[Turn]:
    """Return earlier turns from a list of messages or of (question, answer) pairs."""
    if "history" not in given or given["history"] == "":
        return []
    where, values = f"{given.where}: history", listed(given.where, "history", given["history"])
    if all(isinstance(pair, list) and len(pair) == 2 for pair in values):
        texts = [text_of(where, "of a pair", text) for pair in values for text in pair]
        return [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return turns_of(given.where, values, "history", given.extra, ignore)


def _finished(given: _Given, turns: list[Turn], where: str) -> Record:
    """Return the record of a whole conversation."""
    if given.text("system").strip():
        if any(turn.role == "system" for turn in turns):
            raise DataError(f"{given.where}: both a system message and a field system; keep one of them")
        turns = [Turn("system", given.text("system")), *turns]
    has_question = any(turn.role == "user" for turn in turns[:-1])
    if not has_question or turns[-1].role != "assistant":
        raise DataError(f"{where} must end with a user turn and the assistant's answer")
    first = next(i for i, turn in enumerate(turns) if turn.role == "user")
    given.early = any(turn.role == "assistant" and turn.learned for turn in turns[:first])
    turns = [replace(t, learned=t.learned and t.role != "assistant") for t in turns[:first]] + turns[first:]
    if not any(turn.learned for turn in turns if turn.role == "assistant"):
        raise DataError(
            f"{where}: every assistant turn after the first user turn has weight 0, so there is nothing to "
            "learn; remove the row"
        )
    tools = next(
        (tool_list(given.where, given[name]) for name in ("tools", "functions") if name in given), ()
    )
    task = given.text("task")
    if task.strip() and not is_label(task):
        raise DataError(
            f"{given.where}: field task must be printable text on one line, of up to {MAX_LABEL} characters"
        )
    last = turns[-1]
    return Record(
        tuple(turns[:-1]),
        last.content if last.content.strip() or not last.more else shown(last.more),
        task if task.strip() else None,
        None if last == Turn("assistant", last.content) else last,
        tools,
    )


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
