from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import MODULE, adapter

from fedrouter.train.server.screen import refusals
from fedrouter.types import AdapterState, TrainReply, TrainRequest

A = f"{MODULE}.lora_A.weight"
SENT = adapter(0)


def moved(length: float) -> AdapterState:
    return {**SENT, A: SENT[A] + np.float32(length / np.sqrt(SENT[A].size))}


def judge(*updates: AdapterState, steps: list[int] | None = None, **changes: object) -> list[str | None]:
    steps = steps or [2] * len(updates)
    requests = [TrainRequest(f"c{i}", 0, 0, SENT, s, 1e-3) for i, s in enumerate(steps)]
    replies = [
        replace(TrainReply(request.client, 0, update, 8, 1.0, 0.0), **changes)  # type: ignore[arg-type]
        for request, update in zip(requests, updates, strict=True)
    ]
    return refusals(requests, replies, batch_size=4, outlier=10)


def test_valid_updates_are_accepted() -> None:
    assert judge(moved(1), moved(2), SENT) == [None] * 3


@pytest.mark.parametrize(
    ("update", "changes", "reason"),
    [
        ({n.replace("q_proj", "k_proj"): a for n, a in SENT.items()}, {}, "names, shapes or types"),
        ({**SENT, A: SENT[A][:1]}, {}, "names, shapes or types"),
        ({**SENT, "more": SENT[A]}, {}, "names, shapes or types"),
        ({**SENT, A: SENT[A].astype(np.float16)}, {}, "names, shapes or types"),
        ({**SENT, A: np.full(SENT[A].shape, "0")}, {}, "names, shapes or types"),
        ({**SENT, A: SENT[A] * np.float32(np.nan)}, {}, "not finite"),
        (moved(1), {"loss": float("inf")}, "loss is not finite"),
        (moved(1), {"num_examples": 0}, "claims 0 examples"),
        (moved(1), {"num_examples": 9}, "claims 9 examples in 2 steps of 4"),
    ],
)
def test_unusable_updates_are_refused(update: AdapterState, changes: dict[str, Any], reason: str) -> None:
    (found,) = judge(update, **changes)
    assert found is not None
    assert reason in found
    assert "\n" not in found


def test_outliers_are_judged_per_step_among_at_least_four() -> None:
    assert judge(moved(1), moved(1), moved(500)) == [None] * 3, "three updates are too few to find an outlier"
    *others, far = judge(moved(1), moved(1.2), moved(0.8), moved(500))
    assert others == [None] * 3
    assert far is not None
    assert "455 times as long" in far
    assert judge(moved(1), moved(1), moved(1), moved(20), steps=[1, 1, 1, 20], num_examples=4) == [None] * 4
    assert judge(SENT, SENT, SENT, moved(1)) == [None] * 4, "a median of zero refuses nothing"


def test_a_finite_update_whose_norm_overflows_float32_is_an_outlier() -> None:
    huge = {**SENT, A: np.where(SENT[A] > 0, np.float32(3e38), np.float32(-3e38))}
    assert [r is None for r in judge(moved(1), moved(1), moved(1), huge)] == [True, True, True, False]


def test_noisy_updates_are_not_compared_per_step() -> None:
    steps = [1, 20, 20, 20]
    requests = [TrainRequest(f"c{i}", 0, 0, SENT, s, 1e-3) for i, s in enumerate(steps)]
    replies = [TrainReply(r.client, 0, moved(5), r.steps * 4, None, 0.0) for r in requests]
    assert refusals(requests, replies, 4, 10, noisy=True) == [None] * 4
    assert refusals(requests, replies, 4, 10)[0] is not None


def test_unusable_updates_do_not_count_towards_the_minimum() -> None:
    broken = {**SENT, A: SENT[A] * np.float32(np.inf)}
    assert [r is None for r in judge(moved(1), moved(1), moved(500), broken)] == [True, True, True, False]
