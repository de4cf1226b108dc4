import importlib.util

import pytest
import torch

from fedrouter.config import Config
from fedrouter.errors import ConfigError, TrainingError
from fedrouter.train.machine import check_machine, device_and_dtype


def config(**base: str) -> Config:
    return Config.model_validate({"base": base})


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_machine(config())
    monkeypatch.setenv("WORLD_SIZE", "2")  # as accelerate launch and torchrun set it
    with pytest.raises(TrainingError, match="in one process, and 2 were started"):
        check_machine(config())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_what_needs_a_gpu_says_so() -> None:
    with pytest.raises(TrainingError, match=r'base\.device = "cuda": this machine has no usable GPU'):
        check_machine(config(device="cuda"))
    with pytest.raises(
        TrainingError, match=r'base\.device = "spread" takes two GPUs or more, and there are 0'
    ):
        check_machine(config(device="spread"))
    assert device_and_dtype(config()) == ("cpu", "float32")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_four_bits_without_bitsandbytes() -> None:
    with pytest.raises(
        ConfigError, match=r'base\.quantization = "nf4" needs bitsandbytes: pip install "fedrouter\[qlora'
    ):
        check_machine(config(quantization="nf4"))


def test_what_dtype_is_taken() -> None:
    assert device_and_dtype(config(device="cpu", dtype="bfloat16")) == ("cpu", "bfloat16")
    assert device_and_dtype(config(device="cuda")) == ("cuda", "bfloat16")
    assert device_and_dtype(config(device="spread", dtype="float16")) == ("spread", "float16")
