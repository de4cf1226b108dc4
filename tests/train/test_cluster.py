import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrouter.errors import TrainingError
from fedrouter.train.cluster import QUANTILES, assign, discover, radius, summarise, whitening
from fedrouter.types import Array, ClientSummary, Subset

CENTRES = np.array([[0, 0, 0], [12, 0, 0], [0, 12, 0], [0, 0, 12]], dtype=np.float32)


def rows(tasks: list[int], num: int, seed: int) -> tuple[Array, list[str]]:
    """Rows of some tasks: blobs of unit noise."""
    rng = np.random.default_rng(seed)
    x = np.concatenate([CENTRES[t] + rng.normal(size=(num, 3)) for t in tasks])
    return x.astype(np.float32), [f"t{t}" for t in tasks for _ in range(num)]


def dual(num: int = 60) -> list[tuple[str, Array, list[str]]]:
    return [(f"c{c}", *rows([c % 4, (c + 1) % 4], num, c)) for c in range(8)]


def test_a_client_reveals_counts_centroids_and_scatter_that_add_up() -> None:
    x, tasks = rows([0, 1], 50, 0)
    summary = summarise("c", x, tasks, 2, seed=0)
    assert sorted(c.num_examples for c in summary.clusters) == [50, 50]
    assert sorted(dict(c.task_counts).popitem() for c in summary.clusters) == [("t0", 50), ("t1", 50)]
    mean = sum(c.centroid * c.num_examples for c in summary.clusters) / 100
    np.testing.assert_allclose(mean, x.mean(axis=0), atol=1e-5)
    within = sum(np.cov(x[i : i + 50].T, bias=True) * 50 for i in (0, 50))
    np.testing.assert_allclose(summary.scatter, within, rtol=1e-3)


@pytest.mark.parametrize("num", [4, "auto"])
def test_task_clusters_are_found_across_clients(num: int) -> None:
    data = dual()
    summaries = [summarise(name, x, tasks, "auto", seed=0) for name, x, tasks in data]
    space = discover(summaries, num, "whiten", seed=0)
    assert len(set(space.cluster_of)) == 4
    owners: dict[str, set[int]] = {}
    for _, x, tasks in data:
        labels, _ = assign(space, x, tasks)
        for label, task in zip(labels, tasks, strict=True):
            owners.setdefault(task, set()).add(int(label))
    assert sorted(map(sorted, owners.values())) == [[0], [1], [2], [3]]


def test_the_same_seed_gives_the_same_space() -> None:
    summaries = [summarise(name, x, tasks, 3, seed=5) for name, x, tasks in dual()]
    one, two = (discover(summaries, "auto", "whiten", seed=5) for _ in range(2))
    np.testing.assert_array_equal(one.centroids, two.centroids)


def test_counts_pull_the_task_centroid() -> None:
    big = summarise("big", rows([0], 300, 0)[0], [None] * 300, 1, seed=0)
    small = summarise("small", rows([0], 10, 1)[0] + 3, [None] * 10, 1, seed=0)
    space = discover([big, small], 1, "none", seed=0)
    everything = np.concatenate([rows([0], 300, 0)[0], rows([0], 10, 1)[0] + 3])
    np.testing.assert_allclose(space.centroids[0] + space.mean, everything.mean(axis=0), atol=1e-4)


def test_more_clusters_than_there_can_be() -> None:
    x, tasks = rows([0], 5, 0)
    with pytest.raises(TrainingError, match="client c: 6 local clusters but only 5 rows"):
        summarise("c", x, tasks, 6, seed=0)
    with pytest.raises(TrainingError, match="9 task clusters but only 2 local clusters"):
        discover([summarise("c", x, tasks, 2, seed=0)], 9, "none", seed=0)


@given(seed=st.integers(0, 1000))
def test_whitening_makes_the_pooled_covariance_round(seed: int) -> None:
    mix = np.random.default_rng(seed).normal(size=(4, 4)) + 3 * np.eye(4)
    x = np.random.default_rng(seed + 1).normal(size=(500, 4)) @ mix
    before, after = (np.linalg.cond(np.cov(z.T)) for z in (x, x @ whitening(x.T @ x, len(x))))
    assert after < max(2.0, 0.5 * before)


@given(sizes=st.lists(st.integers(50, 400), min_size=1, max_size=4), quantile=st.floats(0.6, 0.99))
def test_radius_is_the_quantile_of_all_clients_rows_together(sizes: list[int], quantile: float) -> None:
    distances = [np.random.default_rng(i).gamma(2 + i, size=n) for i, n in enumerate(sizes)]
    subsets = [Subset(0, len(d), np.quantile(d, QUANTILES).astype(np.float32), {}) for d in distances]
    within = np.mean(np.concatenate(distances) <= radius(subsets, quantile))
    assert within == pytest.approx(quantile, abs=0.02)


def test_what_a_client_reveals_does_not_grow_with_its_rows() -> None:
    def size(summary: ClientSummary) -> int:
        return summary.scatter.nbytes + sum(c.centroid.nbytes for c in summary.clusters)

    small, large = (summarise("c", *rows([0, 1], num, 0), "auto", seed=0) for num in (100, 2000))
    assert size(small) == size(large)
