"""The picture of the clients' embeddings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrouter.train import picture


class Rows:
    """A client with rows of two tasks, far apart; the last row belongs to no task cluster."""

    def __init__(self, name: str, num: int, dim: int = 8):
        rng = np.random.default_rng(len(name) + num)
        self.name = name
        self._tasks = ["a" if i % 2 else "b" for i in range(num)]
        self._vectors = rng.normal(size=(num, dim)).astype(np.float32)
        self._vectors[1::2] += 20

    def placed(self) -> Any:
        clusters = [i % 2 for i in range(len(self._tasks))]
        clusters[-1] = -1
        return self._vectors, self._tasks, clusters


def drawn(out: Path, *clients: Any) -> Any:
    picture.draw(list(clients), ["even", "odd"], out, seed=3)
    return json.loads((out / picture.FILE).read_text())


def test_rows_of_a_task_are_close_and_have_no_text(tmp_path: Path) -> None:
    found = drawn(tmp_path, Rows("x", 40), Rows("y", 40))
    assert sorted(found) == ["clients", "clusters", "points", "tasks"]
    assert len(found["points"]) == 80
    assert found["clients"] == ["x"] * 40 + ["y"] * 40
    assert found["clusters"].count(None) == 2
    points, tasks = np.array(found["points"]), np.array(found["tasks"])
    middle = {task: points[tasks == task].mean(0) for task in "ab"}
    spread = max(np.linalg.norm(points[tasks == task] - middle[task], axis=1).mean() for task in "ab")
    assert np.linalg.norm(middle["a"] - middle["b"]) > 2 * spread
    assert found == drawn(tmp_path, Rows("x", 40), Rows("y", 40)), "the picture is reproducible"


def test_equally_many_rows_are_drawn_from_large_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture, "MAX_POINTS", 60)
    found = drawn(tmp_path, Rows("many", 200), Rows("some", 100), Rows("few", 5))
    counts = {name: found["clients"].count(name) for name in ("many", "some", "few")}
    assert counts == {"many": 20, "some": 20, "few": 5}


@pytest.mark.parametrize("num", [2, 3, 5])
def test_a_few_rows_are_drawn_too(tmp_path: Path, num: int) -> None:
    assert len(drawn(tmp_path, Rows("x", num))["points"]) == num
