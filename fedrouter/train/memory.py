"""Report out-of-memory errors in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedrouter.errors import TrainingError


def out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out; torch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


@contextmanager
def explained_out_of_memory() -> Iterator[None]:
    """Turn an out-of-memory error into a TrainingError that names the settings to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        where = "GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        raise TrainingError(
            f"out of {where}: lower train.batch_size, train.max_length or lora.rank (before the rounds: "
            "embedder.max_tokens), set train.gradient_checkpointing to true, or base.dtype to bfloat16, or "
            "base.quantization to nf4; then train into another --out, because a run's settings are fixed"
        ) from error
