"""Check what this machine can train on and split it among processes, before anything is loaded."""

import importlib.util
import os
from collections.abc import Sequence

import torch

from fedrouter.config import BaseSettings
from fedrouter.errors import ConfigError, TrainingError
from fedrouter.train.show.trackers import check_trackers


def check_machine(base: BaseSettings, trackers: Sequence[str] = ()) -> None:
    """Refuse settings that this machine cannot run.

    Raises
    ------
    ConfigError, TrainingError
        If a launcher started several processes, or a GPU or a package is missing.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:  # accelerate launch, torchrun
        raise TrainingError(
            f"a launcher started {processes} processes: run fedrouter train without it, with --processes "
            f'{processes}; for a base too large for one GPU set base.device = "spread"'
        )
    wanted, gpus = base.device, torch.cuda.device_count()
    if wanted == "cuda" and not torch.cuda.is_available():
        raise TrainingError('base.device = "cuda": this machine has no usable GPU; set "cpu" or "auto"')
    if wanted == "spread" and gpus < 2:
        raise TrainingError(
            f'base.device = "spread" needs at least two GPUs, but there are {gpus}; set "auto"'
        )
    quantization = base.quantization
    if quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f'base.quantization = "{quantization}" needs bitsandbytes: pip install "fedrouter[qlora]"'
        )
    check_trackers(trackers)


def share_out(base: BaseSettings, processes: int) -> None:
    """Limit this process to its share of the machine's threads.

    Raises
    ------
    TrainingError
        If there are fewer GPUs than processes.
    """
    if processes == 1:
        return
    device, _ = device_and_dtype(base)
    if device == "spread":
        raise TrainingError(
            '--processes: base.device = "spread" uses all GPUs for one process; set another device'
        )
    if device == "cuda" and processes > (gpus := torch.cuda.device_count()):
        raise TrainingError(f"--processes {processes}: each needs its own GPU, but there are {gpus}")
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))


def side_by_side(base: BaseSettings) -> int:
    """Return how many small models to train at the same time: one per GPU or thread, at most four."""
    device, _ = device_and_dtype(base)
    return max(1, min(4, torch.cuda.device_count() if device == "cuda" else torch.get_num_threads()))


def device_and_dtype(base: BaseSettings) -> tuple[str, str]:
    """Return the base model's device ("cpu", "cuda" or "spread") and dtype."""
    device, dtype = base.device, base.dtype
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    return device, dtype
