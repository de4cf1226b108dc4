import pytest
import torch

from fedrouter.errors import TrainingError
from fedrouter.train.local import LocalFederation
from fedrouter.train.memory import explained_out_of_memory
from fedrouter.types import TrainFailure, TrainRequest

TORCH_ON_CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory"
)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), TORCH_ON_CPU])
def test_out_of_memory_error_names_the_settings_in_one_line(error: Exception) -> None:
    settings = r"lower train\.batch_size, train\.max_length"
    with pytest.raises(TrainingError, match=settings) as caught, explained_out_of_memory():
        raise error
    assert "\n" not in str(caught.value)
    assert ("GPU" in str(caught.value)) == isinstance(error, torch.OutOfMemoryError)


def test_other_errors_are_unchanged() -> None:
    with pytest.raises(RuntimeError, match="shapes"), explained_out_of_memory():
        raise RuntimeError("shapes do not fit")


class Broken:
    name = "north"

    def __init__(self, error: Exception):
        self.error = error

    def train(self, request: TrainRequest, trainer: object) -> None:
        raise self.error


def test_a_client_failure_is_a_reply_but_out_of_memory_is_raised() -> None:
    request = TrainRequest("north", 2, 0, {}, 1, 1e-3)
    failing = LocalFederation([Broken(OSError("disk full\nin line 3"))], None)  # type: ignore[list-item, arg-type]
    (answer,) = failing.train([request])
    assert isinstance(answer, TrainFailure)
    assert (answer.client, answer.cluster, answer.reason[:10]) == ("north", 2, "OSError at")
    starved = LocalFederation([Broken(MemoryError())], None)  # type: ignore[list-item, arg-type]
    with pytest.raises(MemoryError):
        list(starved.train([request]))
