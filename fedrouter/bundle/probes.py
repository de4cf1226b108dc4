"""``probes.jsonl``: conversations with their expected task clusters, which are checked on every reload.

A line is ``{"prompt": "…", "cluster": "headline"}``, with ``messages`` in place of ``prompt`` for a
conversation, and null as the cluster if the fallback is expected.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedrouter.bundle.files import MIB, first_problem
from fedrouter.embed import user_texts
from fedrouter.errors import DataError
from fedrouter.types import Probe, Turn

PROBES = "probes.jsonl"
MAX_BYTES, MAX_PROBES = 4 * MIB, 1000  # bounds the duration of a reload


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
            raise ValueError('expected either "prompt" or "messages"')
        return value


def parse_probes(content: bytes, where: Path) -> tuple[Probe, ...]:
    """Parse the content of a probes file; ``where`` names it in errors.

    Raises
    ------
    DataError
        If a line is invalid, or there are no probes or too many.
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
        turns = tuple(user_texts([Turn(message.role, message.content) for message in messages]))
        probes.append(Probe(turns, found.cluster, f"line {number}"))
    if not 0 < len(probes) <= MAX_PROBES:
        raise DataError(f"{where}: {len(probes)} probes; expected 1 to {MAX_PROBES}, one per line")
    return tuple(probes)


def read_probes(file: Path) -> bytes:
    """Return the content of a probes file, after checking that it parses.

    Raises
    ------
    DataError
        If the file cannot be read or parsed.
    """
    try:
        content = file.read_bytes() if file.stat().st_size <= MAX_BYTES else b""
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from error
    if not content:
        raise DataError(f"{file}: empty, or larger than {MAX_BYTES // MIB} MiB")
    parse_probes(content, file)
    return content
