import numpy as np
import pytest
from fakes import MODULE, adapter
from hypothesis import given
from hypothesis import strategies as st

from fedrouter.config import AggregateSettings
from fedrouter.train.lora import average, clip, completed, cut, distance, rank_of
from fedrouter.train.server.aggregate import aggregate, exact, robust_mean
from fedrouter.types import AdapterState, Float64s

A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"
weighted = st.lists(st.integers(1, 1000), min_size=1, max_size=6)


def product(state: AdapterState) -> Float64s:
    """Return the dense ΔW."""
    return state[B].astype(np.float64) @ state[A].astype(np.float64)


@given(weights=weighted, seed=st.integers(0, 1000))
def test_average_equals_numpy(weights: list[int], seed: int) -> None:
    states = [adapter(seed + i) for i in range(len(weights))]
    mean = average(states, weights)
    for name in states[0]:
        want = np.average([s[name] for s in states], axis=0, weights=weights)
        np.testing.assert_allclose(mean[name], want, rtol=1e-6, atol=1e-6)
        assert mean[name].dtype == np.float32


@given(weights=weighted, seed=st.integers(0, 1000))
def test_average_is_the_dense_mean_over_all_pairs_of_clients(weights: list[int], seed: int) -> None:
    """The paper's mean multiplies every client's B by every client's A: ΔW has cross terms."""
    states = [adapter(seed + i) for i in range(len(weights))]
    pairs = [b[B].astype(np.float64) @ a[A].astype(np.float64) for b in states for a in states]
    want = np.average(pairs, axis=0, weights=np.outer(weights, weights).ravel())
    np.testing.assert_allclose(product(average(states, weights)), want, rtol=1e-5, atol=1e-5)


def test_the_average_of_equal_adapters_is_unchanged() -> None:
    state = adapter(0)
    for name, array in average([state, state, state], [1, 5, 2]).items():
        np.testing.assert_allclose(array, state[name], rtol=1e-6)


@given(weights=weighted, seed=st.integers(0, 1000), rank=st.integers(1, 4), spread=st.floats(1e-3, 1.0))
def test_exact_is_the_dense_mean_where_the_rank_allows(
    weights: list[int], seed: int, rank: int, spread: float
) -> None:
    """If all clients' factors share one subspace of the adapter's rank, the mean is exact."""
    rng = np.random.default_rng(seed)
    start = adapter(seed, rank=rank, width=12)
    states = []
    for _ in weights:
        mix_a, mix_b = (np.eye(rank) + spread * rng.normal(size=(rank, rank)) for _ in range(2))
        states.append({A: (mix_a @ start[A]).astype(np.float32), B: (start[B] @ mix_b).astype(np.float32)})
    want = np.average([product(s) for s in states], axis=0, weights=weights)
    found, residual = exact(states, weights)
    assert np.linalg.norm(product(found) - want) <= 1e-5 * np.linalg.norm(want) + 1e-12
    assert residual < 1e-5
    assert found[A].shape == start[A].shape
    assert found[A].dtype == found[B].dtype == np.float32


@given(weights=weighted, seed=st.integers(0, 1000), rank=st.integers(1, 4), width=st.integers(4, 30))
def test_exact_is_the_best_of_its_rank_and_reports_its_residual(
    weights: list[int], seed: int, rank: int, width: int
) -> None:
    states = [adapter(seed + i, rank=rank, width=width) for i in range(len(weights))]
    dense = np.average([product(s) for s in states], axis=0, weights=weights)
    u, values, vt = np.linalg.svd(dense)
    best = u[:, :rank] * values[:rank] @ vt[:rank]
    found, residual = exact(states, weights)
    size = np.linalg.norm(dense)
    assert np.linalg.norm(product(found) - best) <= 1e-5 * size
    assert residual == pytest.approx(np.linalg.norm(dense - best) / size, abs=1e-6)


def test_exact_keeps_directions_that_are_still_unused() -> None:
    """B of a fresh adapter is zero: reducing A to the singular vectors would lose it for good."""
    states = [adapter(0), adapter(0)]
    fresh = [{A: s[A], B: np.zeros_like(s[B])} for s in states]
    np.testing.assert_allclose(exact(fresh, [1, 1])[0][A], states[0][A], atol=1e-6)
    assert not exact(fresh, [1, 1])[0][B].any()
    half = [{A: s[A], B: s[B] * np.array([1, 0], dtype=np.float32)} for s in states]
    np.testing.assert_allclose(exact(half, [1, 3])[0][A], states[0][A], atol=1e-5)
    np.testing.assert_allclose(exact(half, [1, 3])[0][B], half[0][B], atol=1e-5)


@given(weights=weighted, seed=st.integers(0, 1000))
def test_with_a_shared_a_the_mean_of_b_is_the_dense_mean(weights: list[int], seed: int) -> None:
    """As with lora.freeze_a (FFA-LoRA): plain averaging is exact, and ``exact`` agrees."""
    states = [{A: adapter(seed)[A], B: adapter(seed + i)[B]} for i in range(len(weights))]
    want = np.average([product(s) for s in states], axis=0, weights=weights)
    plain, (found, residual) = average(states, weights), exact(states, weights)
    np.testing.assert_allclose(product(plain), want, rtol=1e-5, atol=1e-5)
    for name in plain:
        np.testing.assert_allclose(found[name], plain[name], atol=1e-5)
    assert residual < 1e-6


def test_in_general_the_mean_of_factors_is_not_the_mean_of_products() -> None:
    states = [adapter(0), adapter(1)]
    want = (product(states[0]) + product(states[1])) / 2
    off = np.linalg.norm(product(average(states, [1, 1])) - want)
    assert off > 1.5 * np.linalg.norm(product(exact(states, [1, 1])[0]) - want)


@given(num=st.integers(1, 9), seed=st.integers(0, 1000))
def test_median_and_trimmed_mean_equal_numpy(num: int, seed: int) -> None:
    states = [adapter(seed + i) for i in range(num)]
    stack = np.sort([s[A] for s in states], axis=0)
    np.testing.assert_allclose(robust_mean(states, 0.5)[A], np.median(stack, axis=0), rtol=1e-6)
    cut = 0 if num < 3 else 1 if num <= 5 else 2  # a fifth, rounded up
    want = stack[cut : num - cut].mean(axis=0)
    np.testing.assert_allclose(robust_mean(states, 0.2)[A], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("robust", ["median", "trimmed"])
def test_a_robust_mean_stays_within_the_honest_clients(robust: str) -> None:
    states = [adapter(i) for i in range(4)]
    outlier = {name: array + np.float32(1e6) for name, array in adapter(4).items()}
    found, residual = aggregate([*states, outlier], [1, 1, 1, 1, 1000], AggregateSettings(robust=robust))
    stack = np.stack([s[B] for s in states])
    assert (stack.min(axis=0) <= found[B]).all()
    assert (found[B] <= stack.max(axis=0)).all()
    assert residual is None


@given(norm=st.floats(0.01, 20))
def test_clipping_limits_the_norm_and_keeps_the_direction(norm: float) -> None:
    sent, new = adapter(0), adapter(1)
    length = distance(sent, new)
    found = clip(sent, new, norm)
    assert distance(sent, found) == pytest.approx(min(norm, length), rel=1e-4)
    share = min(1.0, norm / length)
    np.testing.assert_allclose(found[A] - sent[A], share * (new[A] - sent[A]), atol=1e-5)
    assert (found is new) == (length <= norm)


RANK = 4
ranked = st.lists(st.tuples(st.integers(1, RANK), st.integers(1, 1000)), min_size=1, max_size=6)


def slices_apart(states: list[AdapterState], weights: list[int], old: AdapterState) -> list[list[float]]:
    """Return each slice's weights: the clients that have it, or else the old adapter."""
    apart: list[list[float]] = []
    for s in range(RANK):
        own = [w if rank_of(state) > s else 0 for state, w in zip(states, weights, strict=True)]
        apart.append([*own, 0] if any(own) else [*own, 1])
    return apart


@given(clients=ranked, seed=st.integers(0, 1000))
def test_each_slice_is_averaged_over_the_clients_that_have_it(
    clients: list[tuple[int, int]], seed: int
) -> None:
    old, weights = adapter(seed, rank=RANK, width=12), [w for _, w in clients]
    states = [cut(adapter(seed + 1 + i, rank=RANK, width=12), rank) for i, (rank, _) in enumerate(clients)]
    found, _ = aggregate(states, weights, AggregateSettings(), old)
    whole = [*(completed(state, old) for state in states), old]
    for s, own in enumerate(slices_apart(states, weights, old)):
        np.testing.assert_allclose(
            found[A][s], np.average([w[A][s] for w in whole], axis=0, weights=own), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            found[B][:, s], np.average([w[B][:, s] for w in whole], axis=0, weights=own), rtol=1e-5, atol=1e-6
        )
    assert found[A].shape == old[A].shape


@given(clients=ranked, seed=st.integers(0, 1000))
def test_exact_is_the_best_of_its_rank_for_the_slices_products(
    clients: list[tuple[int, int]], seed: int
) -> None:
    """Dense oracle: average each slice's ΔW over the clients that have it, sum, and reduce by a dense SVD."""
    old, weights = adapter(seed, rank=RANK, width=12), [w for _, w in clients]
    states = [cut(adapter(seed + 1 + i, rank=RANK, width=12), rank) for i, (rank, _) in enumerate(clients)]
    whole = [*(completed(state, old) for state in states), old]
    dense = sum(
        np.average([np.outer(w[B][:, s], w[A][s]).astype(np.float64) for w in whole], axis=0, weights=own)
        for s, own in enumerate(slices_apart(states, weights, old))
    )
    u, values, vt = np.linalg.svd(dense)
    best = u[:, :RANK] * values[:RANK] @ vt[:RANK]
    found, residual = aggregate(states, weights, AggregateSettings(method="exact"), old)
    size = np.linalg.norm(dense)
    assert np.linalg.norm(product(found) - best) <= 1e-5 * size
    assert residual == pytest.approx(np.linalg.norm(dense - best) / size, abs=1e-6)
    assert found[A].shape == old[A].shape


@given(rank=st.integers(1, RANK))
def test_cutting_and_completing(rank: int) -> None:
    whole = adapter(3, rank=RANK)
    for name, array in completed(cut(whole, rank), whole).items():
        np.testing.assert_array_equal(array, whole[name])
    assert rank_of(cut(whole, rank)) == rank
