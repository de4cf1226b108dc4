import numpy as np
import pytest
from fakes import PullFederation, adapter
from hypothesis import given
from hypothesis import strategies as st

from fedrouter.config import TrainSettings
from fedrouter.train.server import cosine, run_rounds, share
from fedrouter.types import Assignment, Subset


def subset(cluster: int, num: int) -> Subset:
    return Subset(cluster, num, num // 3, np.zeros(101, dtype=np.float32), {})


@given(sizes=st.lists(st.integers(1, 10_000), min_size=1, max_size=8), total=st.integers(1, 200))
def test_steps_are_shared_exactly_and_fairly(sizes: list[int], total: int) -> None:
    steps = share(sizes, total)
    assert sum(steps) == total
    for size, own in zip(sizes, steps, strict=True):
        assert abs(own - total * size / sum(sizes)) < 1


def test_learning_rate_is_a_cosine_over_rounds() -> None:
    settings = TrainSettings(rounds=5, learning_rate=1.0, learning_rate_end=0.2)
    rates = [cosine(t, settings) for t in range(5)]
    np.testing.assert_allclose(rates, [1.0, 0.8828, 0.6, 0.3172, 0.2], atol=1e-4)
    assert cosine(0, TrainSettings(rounds=1, learning_rate=0.5)) == 0.5


def test_only_clients_of_a_task_cluster_move_its_adapter_weighted_by_examples() -> None:
    targets = {name: adapter(i) for i, name in enumerate(("a", "b", "c"))}
    federation = PullFederation({}, targets)
    assignments = [
        Assignment("a", (subset(0, 10),)),
        Assignment("b", (subset(0, 30), subset(1, 10))),  # 4 steps: 3 for task cluster 0, 1 for 1
        Assignment("c", (subset(1, 10),)),
    ]
    start = adapter(9)
    settings = TrainSettings(rounds=1, steps=4)
    result = next(run_rounds(federation, assignments, [start, start], settings))
    for name in start:
        a = start[name] + (1 - 0.5**4) * (targets["a"][name] - start[name])
        b = start[name] + (1 - 0.5**3) * (targets["b"][name] - start[name])
        np.testing.assert_allclose(result.adapters[0][name], (16 * a + 12 * b) / 28, rtol=1e-4, atol=1e-5)
    assert [(c.cluster, c.num_clients, c.num_examples) for c in result.clusters] == [(0, 2, 28), (1, 2, 20)]
    assert all(c.drift > 0 for c in result.clusters)


def test_a_resumed_run_gives_what_an_uninterrupted_one_gives() -> None:
    targets = {name: adapter(i) for i, name in enumerate(("a", "b"))}
    assignments = [Assignment(name, (subset(0, 10),)) for name in targets]
    settings = TrainSettings(rounds=4, steps=3)
    whole = list(run_rounds(PullFederation({}, targets), assignments, [adapter(9)], settings))
    half = whole[1].adapters
    rest = list(run_rounds(PullFederation({}, targets), assignments, half, settings, start=2))
    assert [r.number for r in rest] == [2, 3]
    for name, array in whole[-1].adapters[0].items():
        np.testing.assert_array_equal(array, rest[-1].adapters[0][name])


def test_a_subset_too_small_for_a_step_does_not_train() -> None:
    federation = PullFederation({}, {"a": adapter(0)})
    assignments = [Assignment("a", (subset(0, 1000), subset(1, 1)))]
    start = adapter(9)
    result = next(run_rounds(federation, assignments, [start, start], TrainSettings(rounds=1, steps=4)))
    assert [r.cluster for r in federation.requests] == [0]
    assert result.adapters[1] is start
    assert pytest.approx(1.0) == result.clusters[0].loss
