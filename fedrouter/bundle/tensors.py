"""Reader of untrusted safetensors files; the whole header is checked before any tensor is read.

The format is a JSON header followed by the tensors (https://github.com/huggingface/safetensors#format). The
library is not used because it does not read bfloat16 into NumPy and needs the whole file in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedrouter.bundle.files import first_problem, shown
from fedrouter.errors import BundleError

MAX_HEADER = 16 << 20  # bytes
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8"}  # bfloat16, which NumPy lacks, as its bits

Size = Annotated[int, Field(ge=1, le=1 << 31)]
Offset = Annotated[int, Field(ge=0, le=1 << 40)]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    dtype: Literal["F32", "F16", "BF16", "I64"]
    shape: Annotated[tuple[Size, ...], Field(min_length=1, max_length=2)]
    data_offsets: tuple[Offset, Offset]


class _Header(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, _Entry] = Field(init=False)

    metadata: dict[str, str] = Field(default_factory=dict, alias="__metadata__")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor's entry in the header."""

    name: str
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]


def read_header(file: BinaryIO, path: Path) -> list[Tensor]:
    """Return a file's tensors in file order; leave the file position at the first tensor.

    Raises
    ------
    BundleError
        If the header is invalid, or does not describe exactly the bytes that follow.
    """
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(MAX_HEADER, size - 8):
        raise BundleError(f"{path}: damaged: no safetensors header; copy the bundle again")
    try:
        entries = _Header.model_validate_json(file.read(length)).__pydantic_extra__
    except ValidationError as error:
        raise BundleError(
            f"{path}: damaged: header: {first_problem(error)}; copy the bundle again"
        ) from error
    end = 0
    tensors = []
    for name, entry in sorted(entries.items(), key=lambda pair: pair[1].data_offsets):
        begin, end_before = entry.data_offsets[0], end
        end = end_before + prod(entry.shape) * np.dtype(DTYPES[entry.dtype]).itemsize
        if entry.data_offsets != (end_before, end):
            raise BundleError(
                f"{path}: damaged: tensor {shown(name)} starts at {begin}, expected {end_before} to {end}; "
                "copy the bundle again"
            )
        tensors.append(Tensor(name, entry.dtype, entry.shape))
    if end != size - 8 - length:
        raise BundleError(
            f"{path}: damaged: {size - 8 - length} bytes of tensors, but its header describes {end}; "
            "copy the bundle again"
        )
    return tensors


def read_tensors(file: BinaryIO, path: Path, tensors: list[Tensor]) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Yield each tensor with its values, bfloat16 as float32; only one is in memory at a time.

    Raises
    ------
    BundleError
        If a value is not finite.
    """
    for tensor in tensors:
        kind = np.dtype(DTYPES[tensor.dtype])
        array = np.frombuffer(file.read(prod(tensor.shape) * kind.itemsize), kind).reshape(tensor.shape)
        if tensor.dtype == "BF16":  # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        if not np.isfinite(array).all():
            raise BundleError(f"{path}: tensor {shown(tensor.name)} has values that are not finite")
        yield tensor, array
