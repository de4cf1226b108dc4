"""The wire format: each message is a safetensors file with its fields as JSON in the header; no code in it.

A message has a kind, fields (numbers, short strings, and lists and maps of them) and arrays. Bytes come from
another machine, so size, version, types and depth are checked before a message is used.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedrouter.errors import WireError

VERSION = 1
MAX_BYTES = 1 << 30  # of one message
MAX_HEADER = 4 << 20  # bytes of the fields and of the arrays' names and shapes
MAX_TEXT = 65_536  # characters of one string; the settings are the longest
MAX_DEPTH = 8
HEAD = "fedrouter"  # the entry of the safetensors header that holds a message's fields
DTYPES = ("F16", "F32", "F64", "I64", "U8")


@dataclass(frozen=True, slots=True)
class Packet:
    """One message, unpacked."""

    kind: str
    fields: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]


def pack(packet: Packet) -> bytes:
    """Return a message's bytes; equal messages give equal bytes."""
    message = {"version": VERSION, "kind": packet.kind, "fields": packet.fields}
    text = json.dumps(message, allow_nan=False, sort_keys=True)
    arrays = {name: np.ascontiguousarray(packet.arrays[name]) for name in sorted(packet.arrays)}
    return save(arrays, metadata={HEAD: text})  # a single entry: safetensors does not order several


def unpack(body: bytes, limit: int = MAX_BYTES) -> Packet:
    """Decode a message.

    Raises
    ------
    WireError
        If the bytes are not a message, exceed ``limit`` bytes, or have another version or invalid content.
    """
    if len(body) > limit:
        raise WireError(f"a message of {len(body)} bytes; at most {limit} are accepted")
    size = int.from_bytes(body[:8], "little")
    if len(body) < 8 or size > min(MAX_HEADER, len(body) - 8):
        raise WireError("a message without a header, or with one that is too large")
    try:
        described = json.loads(body[8 : 8 + size])
        head = json.loads(described["__metadata__"][HEAD])
        if head["version"] != VERSION:
            other = str(head["version"])[:20]
            raise WireError(f"a message of wire version {other}; this side speaks {VERSION}")
        kind, fields = head["kind"], head["fields"]
        dtypes = {entry["dtype"] for name, entry in described.items() if name != "__metadata__"}
        if not dtypes <= set(DTYPES):
            raise WireError(f"a message with arrays of types {sorted(dtypes - set(DTYPES))}")
        arrays = load(body)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
        raise WireError(f"a message that cannot be read: {type(error).__name__}") from error
    if not isinstance(fields, dict):
        raise WireError("a message whose fields are not a map")
    _check(fields, MAX_DEPTH)
    return Packet(kind, fields, arrays)


def _check(value: Any, depth: int) -> None:
    if depth < 0:
        raise WireError(f"a message nested deeper than {MAX_DEPTH}")
    match value:
        case dict():
            for key, inner in value.items():
                _check(key, depth)
                _check(inner, depth - 1)
        case list():
            for inner in value:
                _check(inner, depth - 1)
        case str() if len(value) > MAX_TEXT:
            raise WireError(f"a message with a string of {len(value)} characters; at most {MAX_TEXT}")
        case float() if not math.isfinite(value):
            raise WireError("a message with a number that is not finite")
        case int() if not -(2**63) <= value < 2**63:
            raise WireError("a message with a number beyond 64 bits")
