"""Descriptions of task clusters."""

import numpy as np
import pytest

from fedrouter.config import Config, RoutingSettings
from fedrouter.train.federation import QUANTILES
from fedrouter.train.server.describe import MIN_RADIUS, describe, doubt
from fedrouter.types import Assignment, Subset


@pytest.mark.parametrize(
    ("rows", "num", "changes", "expected"),
    [
        ([16] * 20, 1, {}, True),
        ([16, 16, 500], 1, {}, True),
        ([16, 500], 1, {}, False),
        ([16] * 20, 2, {}, False),
        ([16] * 20, 1, {"privacy": {"min_cluster_size": 1}}, False),
        ([16] * 20, 1, {"cluster": {"global": 1}}, False),
        ([16] * 20, 1, {"method": "fedavg"}, False),
    ],
)
def test_a_single_task_cluster_of_small_clients_gives_a_warning(
    rows: list[int], num: int, changes: dict[str, object], expected: bool
) -> None:
    text = doubt(Config.model_validate(changes), rows, num)
    assert (text is not None) == expected
    if text:
        assert f"{sum(r < 40 for r in rows)} of {len(rows)} clients" in text


def test_no_radius_is_smaller_than_the_median() -> None:
    def radii(*widest: float) -> list[float]:
        subsets = [
            Subset(k, 10**9, np.float32(w) * QUANTILES.astype(np.float32), {}) for k, w in enumerate(widest)
        ]
        found = describe([Assignment("a", tuple(subsets))], len(widest), RoutingSettings(quantile=1.0))
        return [c.radius for c in found]

    np.testing.assert_allclose(radii(2, 10, 12), [10, 10, 12], rtol=1e-5)
    np.testing.assert_allclose(radii(3), [3], rtol=1e-5)
    assert radii(0) == [MIN_RADIUS]
