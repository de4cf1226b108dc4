"""``probes.jsonl``: conversations, and the task cluster that each must go to; reloads ask them.

A line: ``{"prompt": "…", "cluster": "headline"}``, or ``messages`` for ``prompt``, and null for the fallback.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedrouter.bundle.files import MIB, first_problem
from fedrouter.embed import user_texts
from fedrouter.errors import DataError
from fedrouter.types import Probe, Turn

PROBES = "probes.jsonl"
MAX_BYTES, MAX_PROBES = 4 * MIB, 1000  # every reload asks all of them


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    role: str
    content: str


class _Line(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: str | None = None
    messages: Annotated[list[_Message], Field(min_length=1)] | None = None
    cluster: str | None

    @model_validator(mode="before")
    @classmethod
    def _one_of_both(cls, value: Any) -> Any:
        if isinstance(value, dict) and ("prompt" in value) == ("messages" in value):
            raise ValueError('expected "prompt" or "messages"')
        return value


def parse_probes(content: bytes, where: Path) -> tuple[Probe, ...]:
    """Read probes.

    Raises
    ------
    DataError
        If a line is none, or there are none or too many.
    """
    probes = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found = _Line.model_validate_json(line)
        except ValidationError as error:
            raise DataError(f"{where}, line {number}: {first_problem(error)}") from error
        messages = found.messages or [_Message(role="user", content=found.prompt or "")]
        turns = tuple(user_texts([Turn(one.role, one.content) for one in messages]))
        probes.append(Probe(turns, found.cluster, f"line {number}"))
    if not 0 < len(probes) <= MAX_PROBES:
        raise DataError(f"{where}: {len(probes)} probes; expected 1 to {MAX_PROBES}, one a line")
    return tuple(probes)


def read_probes(file: Path) -> bytes:
    """Return the content of a file of probes, once it has been read as such.

    Raises
    ------
    DataError
        If it cannot be read, or is none.
    """
    try:
        content = file.read_bytes() if file.stat().st_size <= MAX_BYTES else b""
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from error
    if not content:
        raise DataError(f"{file}: empty, or larger than {MAX_BYTES // MIB} MiB")
    parse_probes(content, file)
    return content
