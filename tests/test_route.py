from pathlib import Path

import numpy as np
import pytest
from fakes import adapter, space, write
from hypothesis import given
from hypothesis import strategies as st

from fedrouter.bundle import Bundle
from fedrouter.errors import ConfigError
from fedrouter.route import REJECT, Router, transform
from fedrouter.types import RoutingSpace


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    centroids = np.array(
        [[0, 0], [4, 0], [0, 4], [0, 6]], dtype=np.float32
    )  # the last two are of one task cluster
    return write(tmp_path_factory.mktemp("route") / "b", space(centroids, [0, 1, 2, 2]), [1.0, 2.0, 1.0])


def rows(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, dtype=np.float32)


def test_the_nearest_centroid_decides(bundle: Bundle) -> None:
    decision = Router(bundle).route(rows((3, 0)))[0]
    assert decision.cluster == "task-1"
    assert decision.model == bundle.clusters[1].adapter
    assert decision.distance == pytest.approx(1.0)
    assert decision.margin == pytest.approx(2.0)
    assert not decision.fallback
    assert list(decision.distances) == ["task-1", "task-0", "task-2"]


def test_a_task_cluster_may_have_several_centroids(bundle: Bundle) -> None:
    decision = Router(bundle).route(rows((0, 5.5)))[0]
    assert decision.cluster == "task-2"
    assert decision.distance == pytest.approx(0.5)
    assert decision.margin == pytest.approx(5.0), (
        "the margin is to the next task cluster, not to the next centroid"
    )


def test_beyond_the_radius_it_falls_back(bundle: Bundle) -> None:
    far = rows((-3, 0))
    assert (Router(bundle).route(far)[0].model, Router(bundle).route(far)[0].fallback) == ("base", True)
    nearest = Router(bundle, fallback="nearest").route(far)[0]
    assert (nearest.model, nearest.fallback) == (bundle.clusters[0].adapter, True)
    rejected = Router(bundle, fallback="reject").route(far)[0]
    assert (rejected.model, rejected.fallback) == (REJECT, True)
    with pytest.raises(ConfigError, match="fallback 'guess'"):
        Router(bundle, fallback="guess")
    with pytest.raises(ConfigError, match="contains no generalist"):
        Router(bundle, fallback="generalist")


def test_the_generalist_answers_beyond_the_radius_only(tmp_path: Path) -> None:
    bundle = write(tmp_path / "b", space(np.eye(2)), [0.1, 0.1], generalist=adapter(9), fallback="generalist")
    far, near = Router(bundle).route(rows((9, 9), (1, 0)))
    assert (far.model, far.fallback) == (bundle.generalist, True)
    assert (near.model, near.fallback) == (bundle.clusters[0].adapter, False)


def test_no_rows_no_decisions(bundle: Bundle) -> None:
    assert Router(bundle).route(np.zeros((0, 2), dtype=np.float32)) == []


@given(seed=st.integers(0, 2**16), size=st.integers(1, 70))
def test_decisions_do_not_depend_on_the_batch_and_match_brute_force(
    bundle: Bundle, seed: int, size: int
) -> None:
    points = np.random.default_rng(seed).normal(scale=4, size=(size, 2)).astype(np.float32)
    router = Router(bundle)
    together = router.route(points)
    assert together == [router.route(point[None])[0] for point in points]
    brute = np.linalg.norm(points[:, None].astype(float) - bundle.space.centroids[None], axis=2)
    for decision, distances in zip(together, brute, strict=True):
        assert decision.cluster == bundle.clusters[bundle.space.cluster_of[int(distances.argmin())]].name
        assert decision.distance == pytest.approx(distances.min(), abs=1e-6)


def test_thousands_of_centroids_agree_with_numpy(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    centroids = rng.normal(size=(3000, 16)).astype(np.float32)
    bundle = write(tmp_path / "b", space(centroids, [i % 5 for i in range(3000)]), [9.0] * 5)
    points = rng.normal(size=(50, 16)).astype(np.float32)
    want = np.linalg.norm(points[:, None] - centroids[None], axis=2).argmin(axis=1) % 5
    assert [d.cluster for d in Router(bundle).route(points)] == [f"task-{k}" for k in want]


def test_the_transform_is_applied_before_distances() -> None:
    given = RoutingSpace(rows((1, 1))[0], np.diag([2, 3]).astype(np.float32), rows((0, 0)), (0,))
    np.testing.assert_allclose(transform(given, rows((2, 3))), [[2, 6]])
