"""A client's use of its own rows."""

from collections.abc import Sequence

import numpy as np
from fakes import LetterEmbedder, adapter, space

from fedrouter.train.client.client import Client
from fedrouter.train.federation import Trained
from fedrouter.types import AdapterState, Record, TrainRequest, Turn, ValidationRequest

ROWS = [Record((Turn("user", task * 5),), str(i), task) for task in "ab" for i in range(20)]


class Trainer:
    """Records the rows that it tokenises and trains on."""

    validation = 0.2

    def __init__(self) -> None:
        self.tokenised: list[str] = []
        self.trained: list[tuple[str, ...]] = []

    def tokenise(self, records: Sequence[Record]) -> tuple[str, ...]:
        self.tokenised += [r.completion + str(r.task) for r in records]
        return tuple(r.completion + str(r.task) for r in records)

    def train(self, sent: AdapterState, rows: tuple[str, ...], steps: int, rate: float, seed: int) -> Trained:
        self.trained.append(rows)
        return Trained(sent, steps, 1.0, 0.0)

    def loss(self, sent: AdapterState, rows: tuple[str, ...]) -> tuple[float, int]:
        assert not set(rows) & set(self.trained[-1])
        return 1.0, len(rows)


def test_rows_are_tokenised_once_and_validation_rows_are_not_trained_on() -> None:
    client, trainer = Client("c", ROWS, LetterEmbedder(), 0), Trainer()
    found = client.assign(space(np.eye(8, dtype=np.float32)[:2] * 5))
    assert [s.num_examples for s in found.subsets] == [20, 20]
    for number in range(3):
        for k in range(2):
            client.train(TrainRequest("c", k, number, adapter(0), 1, 1e-3), trainer)  # type: ignore[arg-type]
            judged = client.validate(ValidationRequest("c", k, adapter(0)), trainer)  # type: ignore[arg-type]
            assert judged.num_tokens == 4
    assert sorted(trainer.tokenised) == sorted(r.completion + str(r.task) for r in ROWS)
    assert trainer.trained[0] == trainer.trained[2] == trainer.trained[4]
    assert len(trainer.trained[0]) == 16
