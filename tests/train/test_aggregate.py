import numpy as np
import pytest
from fakes import MODULE, adapter
from hypothesis import given
from hypothesis import strategies as st

from fedrouter.errors import TrainingError
from fedrouter.train.aggregate import average


@given(weights=st.lists(st.integers(1, 1000), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_average_is_numpys(weights: list[int], seed: int) -> None:
    states = [adapter(seed + i) for i in range(len(weights))]
    mean = average(states, weights)
    for name in states[0]:
        want = np.average([s[name] for s in states], axis=0, weights=weights)
        np.testing.assert_allclose(mean[name], want, rtol=1e-6, atol=1e-6)
        assert mean[name].dtype == np.float32


def test_alike_adapters_stay_what_they_are() -> None:
    state = adapter(0)
    for name, array in average([state, state, state], [1, 5, 2]).items():
        np.testing.assert_allclose(array, state[name], rtol=1e-6)


def test_updates_that_do_not_fit_are_refused() -> None:
    other = {name.replace("q_proj", "k_proj"): array for name, array in adapter(1).items()}
    with pytest.raises(TrainingError, match="names or shapes"):
        average([adapter(0), other], [1, 1])
    broken = adapter(1)
    broken[f"{MODULE}.lora_A.weight"][0, 0] = np.inf  # type: ignore[index]
    with pytest.raises(TrainingError, match="not finite"):
        average([adapter(0), broken], [1, 1])
