import importlib.util

import pytest
import torch

from fedrouter.config import BaseSettings
from fedrouter.errors import ConfigError, TrainingError
from fedrouter.train.machine import check_machine, device_and_dtype, share_out, side_by_side


def config(**base: str) -> BaseSettings:
    return BaseSettings.model_validate(base)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_machine(config())
    monkeypatch.setenv("WORLD_SIZE", "2")  # as accelerate launch and torchrun set it
    with pytest.raises(TrainingError, match=r"a launcher started 2 processes: .* --processes 2"):
        check_machine(config())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_settings_that_need_a_gpu_are_refused() -> None:
    with pytest.raises(TrainingError, match=r'base\.device = "cuda": this machine has no usable GPU'):
        check_machine(config(device="cuda"))
    with pytest.raises(
        TrainingError, match=r'base\.device = "spread" needs at least two GPUs, but there are 0'
    ):
        check_machine(config(device="spread"))
    assert device_and_dtype(config()) == ("cpu", "float32")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_quantization_needs_bitsandbytes() -> None:
    with pytest.raises(
        ConfigError, match=r'base\.quantization = "nf4" needs bitsandbytes: pip install "fedrouter\[qlora'
    ):
        check_machine(config(quantization="nf4"))


def test_device_and_dtype() -> None:
    assert device_and_dtype(config(device="cpu", dtype="bfloat16")) == ("cpu", "bfloat16")
    assert device_and_dtype(config(device="cuda")) == ("cuda", "bfloat16")
    assert device_and_dtype(config(device="spread", dtype="float16")) == ("spread", "float16")


def test_each_process_gets_its_share_of_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", left.append)
    for processes in (1, 2, 3, 9):
        share_out(config(device="cpu"), processes)
    assert left == [3, 2, 1], "a single process keeps all threads"
    assert side_by_side(config(device="cpu")) == 4


def test_each_process_needs_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    share_out(config(device="cuda"), 2)
    assert side_by_side(config(device="cuda")) == 2
    with pytest.raises(TrainingError, match=r"--processes 3: each needs its own GPU, but there are 2"):
        share_out(config(device="cuda"), 3)
    with pytest.raises(TrainingError, match=r'--processes: base\.device = "spread" uses all GPUs'):
        share_out(config(device="spread"), 2)
