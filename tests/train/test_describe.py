"""What is said of task clusters."""

import pytest

from fedrouter.config import Config
from fedrouter.train.describe import doubt


@pytest.mark.parametrize(
    ("rows", "num", "changes", "said"),
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
def test_one_task_cluster_of_many_small_clients_is_doubted(
    rows: list[int], num: int, changes: dict[str, object], said: bool
) -> None:
    text = doubt(Config.model_validate(changes), rows, num)
    assert (text is not None) == said
    if text:
        assert f"{sum(r < 40 for r in rows)} of {len(rows)} clients" in text
