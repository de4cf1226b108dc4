import numpy as np
import pytest
import torch
from fakes import MODULE, adapter
from hypothesis import given
from hypothesis import strategies as st

from fedrouter.config import AggregateSettings
from fedrouter.train.server.optimizer import ADAPTIVITY, server_step
from fedrouter.types import AdapterState, Float64s


def run(settings: AggregateSettings, targets: list[AdapterState]) -> AdapterState:
    current = adapter(0)
    moments: AdapterState = {}
    for target in targets:
        current, moments = server_step(current, target, moments, settings)
    return current


def test_without_an_optimizer_the_mean_is_unchanged() -> None:
    current, moments = server_step(adapter(0), want := adapter(1), {}, AggregateSettings())
    assert current is want
    assert moments == {}


def test_momentum_equals_torch_sgd() -> None:
    """The server's gradient is the negative mean update."""
    settings = AggregateSettings(server="momentum", server_learning_rate=0.5)
    targets = [adapter(i) for i in (1, 2, 3)]
    found = run(settings, targets)
    for name, array in adapter(0).items():
        weight = torch.from_numpy(array.copy()).requires_grad_()
        optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.9)
        for target in targets:
            weight.grad = weight.detach() - torch.from_numpy(target[name])
            optimizer.step()
        np.testing.assert_allclose(found[name], weight.detach().numpy(), rtol=1e-4, atol=1e-5)


@given(seed=st.integers(0, 1000), rate=st.floats(0.01, 1.5), num=st.integers(1, 4))
def test_momentum_with_a_shared_a_is_momentum_of_the_dense_product(seed: int, rate: float, num: int) -> None:
    a, b = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"
    current = adapter(seed)
    moments: AdapterState = {}
    dense = (current[b] @ current[a]).astype(np.float64)
    step: Float64s | float = 0.0
    settings = AggregateSettings(server="momentum", server_learning_rate=rate)
    for i in range(num):
        wanted = {a: current[a], b: adapter(seed + 1 + i)[b]}
        step = 0.9 * step + (wanted[b] @ wanted[a] - dense)
        dense = dense + rate * step
        current, moments = server_step(current, wanted, moments, settings)
    np.testing.assert_allclose(current[b] @ current[a], dense, rtol=1e-3, atol=1e-3)


@given(seed=st.integers(0, 1000))
def test_adam_equals_the_recursion_of_the_paper(seed: int) -> None:
    found = run(AggregateSettings(server="adam"), targets := [adapter(seed + i) for i in (1, 2, 3)])
    for name, array in adapter(0).items():
        x, m, v = array.astype(float), 0.0, 0.0
        for target in targets:
            delta = target[name] - x
            m, v = 0.9 * m + 0.1 * delta, 0.99 * v + 0.01 * delta**2
            x = x + 1e-3 * m / (np.sqrt(v) + ADAPTIVITY)
        np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 1000), rate=st.floats(1e-4, 0.1), num=st.integers(1, 4))
def test_adam_with_an_identity_a_is_adam_of_the_dense_product(seed: int, rate: float, num: int) -> None:
    settings = AggregateSettings(server="adam", server_learning_rate=rate)
    rng = np.random.default_rng(seed)
    a, b = sorted(adapter(0))
    eye = np.eye(6, dtype=np.float32)  # of full rank: B is ΔW
    current: AdapterState = {a: eye, b: rng.normal(size=(6, 6)).astype(np.float32)}
    moments: AdapterState = {}
    dense = (current[b] @ eye).astype(np.float64)
    first: Float64s | float = 0.0
    second: Float64s | float = 0.0
    for _ in range(num):
        wanted = {a: eye, b: rng.normal(size=(6, 6)).astype(np.float32)}
        change = wanted[b] @ wanted[a] - dense
        first, second = 0.9 * first + 0.1 * change, 0.99 * second + 0.01 * change**2
        dense = dense + rate * first / (np.sqrt(second) + ADAPTIVITY)
        current, moments = server_step(current, wanted, moments, settings)
    np.testing.assert_allclose(current[b] @ current[a], dense, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(current[a], eye)


@pytest.mark.parametrize("server", ["momentum", "adam"])
def test_moments_are_float32_and_affect_the_next_round(server: str) -> None:
    settings = AggregateSettings(server=server)
    current, moments = server_step(adapter(0), adapter(1), {}, settings)
    assert all(a.dtype == np.float32 for a in [*current.values(), *moments.values()])
    again, _ = server_step(current, adapter(2), moments, settings)
    cold, _ = server_step(current, adapter(2), {}, settings)
    assert any(not np.array_equal(again[n], cold[n]) for n in again)
