"""Data that leaves a client: every message of whole runs is checked against docs/privacy.md."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import adapter, write
from watched import (
    CONFIG,
    DIM,
    TASKS,
    TaskEmbedder,
    Trainer,
    Watched,
    clients,
    inspect,
    leaves,
    listed,
    rows,
    same,
    whole_run,
)

from fedrouter.config import ClusterSettings, Config, PrivacySettings, TrainSettings
from fedrouter.errors import DataError, TrainingError
from fedrouter.train import join
from fedrouter.train.client.client import Client
from fedrouter.train.local import LocalFederation
from fedrouter.train.server.discover import discover
from fedrouter.train.server.loop import run_rounds
from fedrouter.train.server.methods import group
from fedrouter.train.state import fresh_state
from fedrouter.types import Array, Record, RoutingSpace


def test_only_documented_data_leaves_a_client() -> None:
    members = clients()
    held = members[0]._records
    assert isinstance(held, list)
    for i in range(40):
        held[i] = Record(held[i].turns, "poison", "colours")
    federation = Watched(members)
    federation.members()
    whole_run(federation)
    place = np.zeros((1, DIM), np.float32)
    federation.compare(RoutingSpace(place[0], np.eye(DIM, dtype=np.float32), place, (0,)), [100.0])
    federation.reread()
    assert inspect(federation, members) == listed()


def test_the_inspection_detects_a_revealed_row() -> None:
    members = clients(num=30, privacy=PrivacySettings(min_cluster_size=1))
    federation = Watched(members)
    discover(federation, ClusterSettings(), 0)
    with pytest.raises(AssertionError, match=r"vector of a row|fewer than 5 rows"):
        inspect(federation, members)
    with pytest.raises(AssertionError, match="vector of a row"):
        inspect(federation, members, least=1)


def test_many_small_clients_show_their_tasks_without_revealing_few_rows() -> None:
    words = ("colours", "numbers", "gulls")
    members = [
        Client(f"c{i}", rows(i, 9, (words[i % 3], words[(i + 1) % 3])), TaskEmbedder(), 0) for i in range(24)
    ]
    federation = Watched(members)
    space = discover(federation, ClusterSettings(), 0)
    federation.assign(space)
    assert inspect(federation, members) <= listed()
    first = {
        w: {k for m in members for k, own in m._rows.items() for i in own if m._tasks[i] == w} for w in words
    }
    assert len(set().union(*first.values())) == 3
    assert all(len(found) == 1 for found in first.values())


@pytest.mark.parametrize("method", ["fedavg", "local", "clustered", "feddpa", "oracle"])
def test_the_baselines_reveal_no_more(method: str) -> None:
    members = clients(num=20)
    federation = Watched(members)
    whole_run(federation, Config(method=method, train=TrainSettings(rounds=2, steps=4)))
    assert inspect(federation, members) <= listed()


def test_messages_do_not_grow_with_the_rows() -> None:
    sizes = []
    for num in (3000, 6000):
        federation = Watched(clients(num))
        whole_run(federation)
        largest: dict[Any, int] = {}
        for _, _, message in federation.seen:
            for key, value in leaves(message):
                size = len(value) if isinstance(value, dict) else np.size(value)
                largest[key] = max(largest.get(key, 0), size)
        sizes.append(largest)
    assert sizes[0] == sizes[1]


def test_each_exchange_happens_once_and_rounds_carry_adapters_only() -> None:
    federation = Watched(clients())
    whole_run(federation)
    names = federation.names()
    before = names[: names.index("train")]
    assert before == [name for name in ("summarise", "assign") for _ in range(3)]
    assert set(names[len(before) :]) == {"train", "validate"}


def test_a_resumed_run_sends_the_same_messages() -> None:
    first, again = Watched(clients()), Watched(clients())
    whole_run(first)
    whole_run(again)
    assert same(first, again)


def test_joining_reveals_only_documented_messages(tmp_path: Path) -> None:
    members = clients()
    space = discover(LocalFederation(members, Trainer()), ClusterSettings(), 0)  # type: ignore[arg-type]
    bundle = write(tmp_path / "bundle", space, [9.0] * space.num_clusters)
    late = Client("oslo", [*rows(7, 3, ("colours",)), *rows(7, 60, ("numbers", "gulls"))], TaskEmbedder(), 0)
    federation = Watched([late])
    found = join.placed(bundle, federation, 0.97)
    assert sorted(s.num_examples for s in found.assignments[0].subsets) == [60, 63]
    assert late.beyond is not None
    asked = federation.names()
    assert asked[0] == "compare"
    assert "summarise_beyond" in asked, "the rows beyond were searched for a new task"
    own = [one for one in federation.seen if one[0] != "summarise_beyond"]
    assert inspect(federation, [late], seen=own) <= listed()
    beyond = [one for one in federation.seen if one[0] == "summarise_beyond"]
    assert inspect(federation, [late.beyond], seen=beyond) <= listed()


def test_few_rows_beyond_are_not_revealed() -> None:
    late = Client("oslo", [*rows(7, 3, ("gulls",)), *rows(7, 60, ("numbers",))], TaskEmbedder(), 0)
    place = np.array([late._vectors[3:].mean(0)])
    space = RoutingSpace(np.zeros(DIM, np.float32), np.eye(DIM, dtype=np.float32), place, (0,))
    comparison = late.compare(space, [14.0])
    assert (comparison.within, comparison.num_beyond, comparison.may_summarise) == ({0: 60}, 0, False)


def test_a_client_with_four_rows_is_refused_and_one_with_16_works() -> None:
    with pytest.raises(DataError, match=r"4 rows in its data; .* at least 5"):
        Client("few", rows(0, 2), TaskEmbedder(), 0)
    members = [Client(f"c{i}", rows(i, 16, (TASKS[i % 2],)), TaskEmbedder(), 0) for i in range(8)]
    federation = Watched(members)
    found = group(federation, CONFIG, adapter(0), DIM)
    assert len(set(found.space.cluster_of)) == 2
    inspect(federation, members)


def test_no_adapter_is_trained_on_fewer_rows_than_the_minimum() -> None:
    few = [*rows(0, 60, ("colours",)), *rows(0, 4, ("numbers",))]
    members = [Client("few", few, TaskEmbedder(), 0), *clients()[1:]]
    federation = Watched(members)
    found = group(federation, CONFIG, adapter(0), DIM)
    own = next(a for a in found.assignments if a.client == "few")
    assert [s.num_examples for s in own.subsets] == [64], "the four rows join the others"
    assert [len(r) for r in members[0]._rows.values()] == [64]
    assert own.subsets[0].task_counts == {"colours": 60, "few rows": 4}, (
        "the label of four rows is not revealed"
    )


def test_failures_name_error_and_place_but_quote_no_row(caplog: pytest.LogCaptureFixture) -> None:
    poisoned = [Record(r.turns, f"poison {r.completion}", r.task) for r in rows(0, 20, ("colours",))]
    federation = Watched([Client("ulm", poisoned, TaskEmbedder(), 0)])
    space = RoutingSpace(
        np.zeros(DIM, np.float32), np.eye(DIM, dtype=np.float32), np.zeros((1, DIM), np.float32), (0,)
    )
    assignments = federation.assign(space)
    result = next(run_rounds(federation, assignments, fresh_state([adapter(0)]), CONFIG))
    reason = result.clusters[0].refused["ulm"]
    assert re.fullmatch(r"ValueError at watched\.py:\d+; its own log says more", reason)
    assert "cannot tokenise 'colours secret" in caplog.text


def test_a_client_whose_vectors_are_not_finite_is_named_before_anything_is_revealed() -> None:
    class Overflowing(TaskEmbedder):
        def embed(self, texts: Sequence[str]) -> Array:
            return np.where(np.arange(len(texts))[:, None] == 1, np.inf, super().embed(texts)).astype(
                np.float32
            )

    with pytest.raises(TrainingError, match=r"client ulm: .* not finite; set base\.dtype"):
        Client("ulm", rows(0, 10), Overflowing(), 0)
