import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import PullFederation, adapter
from hypothesis import given
from hypothesis import strategies as st

from fedrouter.config import AggregateSettings, Config, TrainSettings
from fedrouter.train.disk.checkpoint import latest_checkpoint, save_checkpoint
from fedrouter.train.lora import cut, distance, rank_of
from fedrouter.train.server.loop import Planned, cosine, plan, run_rounds, share, turns
from fedrouter.train.state import ClusterRound, fresh_state
from fedrouter.types import (
    AdapterState,
    Assignment,
    Subset,
    TrainFailure,
    TrainReply,
    TrainRequest,
    ValidationReply,
    ValidationRequest,
)


def config(aggregate: AggregateSettings | None = None, **train: object) -> Config:
    return Config(train=TrainSettings(**train), aggregate=aggregate or AggregateSettings())


def subset(cluster: int, num: int) -> Subset:
    return Subset(cluster, num, np.zeros(101, dtype=np.float32), {})


@given(sizes=st.lists(st.integers(1, 10_000), min_size=1, max_size=8), total=st.integers(1, 200))
def test_steps_are_split_exactly_and_in_proportion(sizes: list[int], total: int) -> None:
    steps = share(sizes, total, least=0)
    assert sum(steps) == total
    for size, own in zip(sizes, steps, strict=True):
        assert abs(own - total * size / sum(sizes)) < 1


def test_learning_rate_is_a_cosine_over_rounds() -> None:
    settings = TrainSettings(rounds=5, learning_rate=1.0, learning_rate_end=0.2)
    rates = [cosine(t, settings) for t in range(5)]
    np.testing.assert_allclose(rates, [1.0, 0.8828, 0.6, 0.3172, 0.2], atol=1e-4)
    assert cosine(0, TrainSettings(rounds=1, learning_rate=0.5)) == 0.5


def test_an_adapter_is_averaged_over_its_clients_weighted_by_examples() -> None:
    targets = {name: adapter(i) for i, name in enumerate(("a", "b", "c"))}
    federation = PullFederation({}, targets)
    assignments = [
        Assignment("a", (subset(0, 10),)),
        Assignment("b", (subset(0, 30), subset(1, 10))),  # 4 steps: 3 for task cluster 0, 1 for 1
        Assignment("c", (subset(1, 10),)),
    ]
    start = adapter(9)
    result = next(run_rounds(federation, assignments, fresh_state([start, start]), config(rounds=1, steps=4)))
    for name in start:
        a = start[name] + (1 - 0.5**4) * (targets["a"][name] - start[name])
        b = start[name] + (1 - 0.5**3) * (targets["b"][name] - start[name])
        np.testing.assert_allclose(
            result.state.adapters[0][name], (16 * a + 12 * b) / 28, rtol=1e-4, atol=1e-5
        )
    assert [(c.cluster, c.num_clients, c.num_examples) for c in result.clusters] == [(0, 2, 28), (1, 2, 20)]
    assert all(c.drift > 0 for c in result.clusters)


@pytest.mark.parametrize("server", ["none", "momentum", "adam"])
def test_a_resumed_run_equals_an_uninterrupted_one(server: str, tmp_path: Path) -> None:
    targets = {name: adapter(i) for i, name in enumerate(("a", "b"))}
    assignments = [Assignment(name, (subset(0, 10),)) for name in targets]
    settings = config(AggregateSettings(server=server), rounds=4, steps=3)
    whole = list(run_rounds(PullFederation({}, targets), assignments, fresh_state([adapter(9)]), settings))
    save_checkpoint(tmp_path, whole[1].state, "digest", keep=1)
    assert latest_checkpoint(tmp_path, "another clustering") is None
    loaded = latest_checkpoint(tmp_path, "digest")
    assert loaded is not None
    rest = list(run_rounds(PullFederation({}, targets), assignments, loaded, settings))
    assert [r.number for r in rest] == [2, 3]
    assert whole[-1].state.losses == rest[-1].state.losses
    for mine, theirs in zip(
        (*whole[-1].state.adapters, *whole[-1].state.moments),
        (*rest[-1].state.adapters, *rest[-1].state.moments),
        strict=True,
    ):
        assert mine.keys() == theirs.keys()
        assert all(mine[name].tobytes() == theirs[name].tobytes() for name in mine)


class Troubled(PullFederation):
    """Some clients fail or send unusable updates."""

    def __init__(self, targets: dict[str, AdapterState], failing: set[str], broken: set[str]):
        super().__init__({}, targets)
        self.failing, self.broken = failing, broken

    def train(self, requests: Sequence[TrainRequest]) -> Iterator[TrainReply | TrainFailure]:
        for reply in self.pulled(requests):
            if reply.client in self.failing:
                yield TrainFailure(reply.client, reply.cluster, "RuntimeError: the disk is full")
            elif reply.client in self.broken:
                yield replace(reply, adapter={n: a * np.float32(np.nan) for n, a in reply.adapter.items()})
            else:
                yield reply
                yield reply  # sent twice, counted once
                yield replace(reply, client="stranger")


def test_a_failing_client_loses_only_its_update() -> None:
    targets = {name: adapter(i) for i, name in enumerate(("a", "b", "c"))}
    assignments = [Assignment(name, (subset(0, 10),)) for name in targets]
    settings, start = config(rounds=2, steps=3), fresh_state([adapter(9)])
    troubled = Troubled(targets, {"a"}, {"b"})
    first = next(run_rounds(troubled, assignments, start, settings))
    alone = next(
        run_rounds(PullFederation({}, targets), [a for a in assignments if a.client == "c"], start, settings)
    )
    assert first.clusters[0].refused == {
        "a": "RuntimeError: the disk is full",
        "b": "its update holds values that are not finite; lower train.learning_rate",
    }
    assert (first.clusters[0].num_clients, first.clusters[0].loss) == (1, 1.0)
    for name, array in first.state.adapters[0].items():
        np.testing.assert_array_equal(array, alone.state.adapters[0][name])


def test_a_task_cluster_whose_clients_all_fail_keeps_its_adapter() -> None:
    targets = {name: adapter(i) for i, name in enumerate(("a", "b"))}
    assignments = [Assignment("a", (subset(0, 10),)), Assignment("b", (subset(1, 10),))]
    start = fresh_state([adapter(8), adapter(9)])
    results = list(run_rounds(Troubled(targets, {"a"}, set()), assignments, start, config(rounds=2, steps=3)))
    assert results[-1].state.adapters[0] is start.adapters[0]
    assert results[-1].state.adapters[1] is not start.adapters[1]
    assert results[-1].state.losses == (None, 0.5)
    assert [c.loss for c in results[-1].clusters] == [None, 0.5]
    assert list(results[-1].clusters[0].refused) == ["a"]


def test_exact_reports_its_residual_and_clipping_bounds_the_drift() -> None:
    targets = {name: adapter(i) for i, name in enumerate(("a", "b"))}
    assignments = [Assignment(name, (subset(0, 10),)) for name in targets]

    def drift(settings: AggregateSettings) -> ClusterRound:
        state = fresh_state([adapter(9)])
        rounds = run_rounds(PullFederation({}, targets), assignments, state, config(settings, rounds=1))
        return next(rounds).clusters[0]

    assert 0 < drift(AggregateSettings(method="exact")).residual < 1  # type: ignore[operator]
    assert drift(AggregateSettings()).residual is None
    assert drift(AggregateSettings(clip=1e-3)).drift < 1e-3 < drift(AggregateSettings()).drift


class Lying(PullFederation):
    """One client of six reverses its update and scales it by eight."""

    def train(self, requests: Sequence[TrainRequest]) -> Iterator[TrainReply | TrainFailure]:
        for reply, request in zip(self.pulled(requests), reversed(requests), strict=True):
            turned = {n: a - 8 * (reply.adapter[n] - a) for n, a in request.adapter.items()}
            yield replace(reply, adapter=turned) if reply.client == "f" else reply


@pytest.mark.parametrize("option", [{"robust": "median"}, {"robust": "trimmed"}, {"clip": 0.5}])
def test_robust_options_withstand_a_lying_client(option: dict[str, object]) -> None:
    target = adapter(1)
    targets: dict[str, AdapterState] = {
        name: {n: a + np.float32(i / 100) for n, a in target.items()} for i, name in enumerate("abcdef")
    }
    assignments = [Assignment(name, (subset(0, 10),)) for name in targets]

    def far(**how: object) -> float:
        settings = AggregateSettings(outlier=1e9, **how)
        *_, last = run_rounds(
            Lying({}, targets),
            assignments,
            fresh_state([adapter(9)]),
            config(settings, rounds=20, steps=2, schedule="all"),
        )
        return distance(target, last.state.adapters[0])

    assert far(**option) < 0.2 * distance(adapter(9), target) < far()


@pytest.mark.parametrize("schedule", ["all", "turns"])
def test_the_smallest_subset_trains_too(schedule: str) -> None:
    federation = PullFederation({}, {"a": adapter(0)})
    assignments = [Assignment("a", (subset(0, 1000), subset(1, 1)))]
    settings = config(rounds=1, steps=4, schedule=schedule)
    list(run_rounds(federation, assignments, fresh_state([adapter(9)] * 2), settings))
    assert [(r.cluster, r.steps) for r in federation.requests] == [(0, 3), (1, 1)]


@pytest.mark.parametrize("method", ["average", "exact"])
def test_a_client_of_lower_rank_trains_only_its_slices(method: str) -> None:
    targets = {"a": adapter(0, rank=3), "b": cut(adapter(1, rank=3), 1)}
    settings = Config.model_validate(
        {
            "lora": {"rank": 3, "ranks": {"b": 1}},
            "train": {"rounds": 2, "steps": 2},
            "aggregate": {"method": method},
        }
    )
    assignments = [Assignment(name, (subset(0, 10),)) for name in targets]
    federation = PullFederation({}, targets)
    start = fresh_state([adapter(9, rank=3)])
    first = next(run_rounds(federation, assignments, start, settings))
    assert {r.client: rank_of(r.adapter) for r in federation.requests} == {"a": 3, "b": 1}
    assert first.clusters[0].refused == {}
    alone = next(run_rounds(PullFederation({}, targets), assignments[1:], start, settings))
    whole, moved = start.adapters[0], alone.state.adapters[0]
    if method == "average":  # slices without a client do not change
        for name, array in moved.items():
            rest = np.s_[1:] if ".lora_A." in name else np.s_[:, 1:]
            np.testing.assert_allclose(array[rest], whole[name][rest], rtol=1e-6)
    assert rank_of(moved) == 3
    assert alone.clusters[0].norm == pytest.approx(0.75 * distance(cut(whole, 1), targets["b"]), rel=1e-5)


def plans(num_rounds: int = 6, **train: object) -> list[list[Planned]]:
    assignments = [Assignment("a", (subset(0, 30), subset(1, 10))), Assignment("b", (subset(1, 9),))]
    settings = TrainSettings(rounds=num_rounds, **train)
    return [plan(assignments, settings, 0, number) for number in range(num_rounds)]


def test_the_schedule_uses_all_subsets_or_takes_turns() -> None:
    assert plans(2, steps=4, schedule="all") == [[("a", 0, 3), ("a", 1, 1), ("b", 1, 4)]] * 2
    large, small = [("a", 0, 4), ("b", 1, 4)], [("a", 1, 4), ("b", 1, 4)]
    assert plans(8, steps=4) == [large, large, small, large, large, large, small, large]


@given(
    sizes=st.lists(st.integers(1, 10_000), min_size=2, max_size=12).map(tuple),
    rounds=st.integers(1, 30),
    steps=st.integers(1, 40),
    data=st.data(),
)
def test_turns_use_every_round_and_every_subset(
    sizes: tuple[int, ...], rounds: int, steps: int, data: st.DataObject
) -> None:
    dealt = turns(sizes, rounds, steps, data.draw(st.integers(0, len(sizes) - 1)))
    assert len(dealt) == rounds
    for now in dealt:
        assert sum(now.values()) == max(steps, len(now))
        assert min(now.values()) >= 1
    for i, size in enumerate(sizes):
        assert sum(i in now for now in dealt) >= min(2, rounds)
        if rounds * steps >= 100 * len(sizes) and steps >= 2 * len(sizes):
            got = sum(now.get(i, 0) for now in dealt) / (rounds * steps)
            assert got == pytest.approx(size / sum(sizes), abs=0.25)


@pytest.mark.parametrize(("num", "rounds"), [(2, 8), (4, 8), (3, 9), (5, 25)])
def test_subsets_of_one_size_get_whole_rounds_in_turn(num: int, rounds: int) -> None:
    dealt = turns((10,) * num, rounds, 15, 1)
    assert dealt == [{(1 + number) % num: 15} for number in range(rounds)]


@pytest.mark.parametrize("every", [1, 2, 5])
def test_between_two_clusterings_every_subset_is_trained(every: int) -> None:
    assignments = [Assignment("a", (subset(0, 300), subset(1, 10), subset(2, 80)))]
    settings = TrainSettings(rounds=10, steps=8)
    for start in range(0, 10, every):
        planned = [plan(assignments, settings, 0, n, every) for n in range(start, min(start + every, 10))]
        assert {p.cluster for now in planned for p in now} == {0, 1, 2}


def test_clients_drawn_for_some_rounds_take_turns_over_those() -> None:
    assignments = [Assignment(name, (subset(0, 30), subset(1, 30))) for name in ("a", "b")]
    settings = TrainSettings(rounds=20, steps=4, participation=0.5)
    clusters = defaultdict(list)
    for number in range(20):
        for planned in plan(assignments, settings, 0, number):
            clusters[planned.client].append(planned.cluster)
    assert all(
        a != b for turn in clusters.values() for a, b in itertools.pairwise(turn) if len(turn) % 2 == 0
    )
    assert sum(map(len, clusters.values())) == 20


def test_nobody_is_left_without_a_step() -> None:
    assert share([1000, 10, 10], 15) == [13, 1, 1]
    assert share([10] * 4, 3) == [1, 1, 1, 1]
    assert share([0.5, 0.25], 8) == [5, 3]


def test_in_turn_clients_spread_over_the_task_clusters() -> None:
    pairs = [(0, 1), (1, 2), (2, 3), (0, 3)] * 2
    assignments = [
        Assignment(f"c{i}", tuple(subset(cluster, 10) for cluster in pair)) for i, pair in enumerate(pairs)
    ]
    for number in range(4):
        planned = plan(assignments, TrainSettings(steps=4), 0, number)
        assert Counter(cluster for _, cluster, _ in planned) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_in_turn_clients_with_fewer_subsets_choose_first() -> None:
    assignments = [Assignment("a", (subset(0, 10), subset(1, 10))), Assignment("b", (subset(0, 10),))]
    planned = plan(assignments, TrainSettings(steps=4), 0, 0)
    assert {client: cluster for client, cluster, _ in planned} == {"a": 1, "b": 0}


def test_epochs_are_passes_over_the_training_rows() -> None:
    assert plans(1, epochs=2, batch_size=8) == [[("a", 0, 8), ("a", 1, 4), ("b", 1, 4)]]
    assert plans(1, epochs=1, batch_size=8, validation=0.2) == [[("a", 0, 3), ("a", 1, 1), ("b", 1, 1)]]


def test_participation_draws_are_random_per_round_and_reproducible() -> None:
    half = plans(40, steps=4, participation=0.5)
    asked = [{client for client, _, _ in one} for one in half]
    assert all(len(clients) == 1 for clients in asked)
    assert 8 <= sum("a" in clients for clients in asked) <= 32
    assert half == plans(40, steps=4, participation=0.5)
    assert plans(1, participation=0.01)[0], "at least one client takes part"


class Absent(PullFederation):
    """Its easy client validates every round, its hard one only some."""

    def __init__(self, present: Sequence[int]):
        super().__init__({}, {"easy": adapter(1), "hard": adapter(1)})
        self.present, self.number = present, -1

    def validate(self, requests: Sequence[ValidationRequest]) -> Iterator[ValidationReply | TrainFailure]:
        self.number += 1
        for request in requests:
            if request.client == "easy" or self.number in self.present:
                loss = {"easy": 1.0, "hard": 5.0}[request.client] - 0.1 * self.number
                yield ValidationReply(request.client, 0, loss, 3)


@pytest.mark.parametrize("present", [(0, 1, 2, 3), (0, 2, 3), (0, 1), ()])
def test_a_round_is_not_the_best_because_a_client_is_missing(present: Sequence[int]) -> None:
    assignments = [Assignment(name, (subset(0, 10),)) for name in ("easy", "hard")]
    *_, last = run_rounds(
        Absent(present), assignments, fresh_state([adapter(9)]), config(rounds=4, validation=0.2)
    )
    (best,) = last.state.best
    assert best is not None
    assert best.round == 3, "losses fall in every round"


class Judged(PullFederation):
    """Replies with the given validation losses, by round."""

    def __init__(self, losses: list[list[float]]):
        super().__init__({}, {"a": adapter(1)})
        self.losses = iter(losses)

    def validate(self, requests: Sequence[ValidationRequest]) -> Iterator[ValidationReply | TrainFailure]:
        for request, loss in zip(requests, next(self.losses), strict=True):
            yield ValidationReply(request.client, request.cluster, loss, 3)


def test_each_task_cluster_keeps_its_best_round_and_patience_ends_the_run(tmp_path: Path) -> None:
    losses = [[3.0, 3.0], [2.0, 1.0], [2.5, 1.5], [1.75, 1.25], [2.0, 2.0], [2.0, 2.0], [0.0, 0.0]]
    assignments = [Assignment("a", (subset(0, 10), subset(1, 10)))]
    settings = config(rounds=7, steps=4, schedule="all", validation=0.2, patience=2)
    rounds = list(run_rounds(Judged(losses), assignments, fresh_state([adapter(8), adapter(9)]), settings))
    assert len(rounds) == 6, "no loss fell after round 3"
    assert [[c.validation for c in r.clusters] for r in rounds] == losses[:6]
    last = rounds[-1].state
    assert last.best_adapters[0] is rounds[3].state.adapters[0]
    assert last.best_adapters[1] is rounds[1].state.adapters[1]
    save_checkpoint(tmp_path, last, "digest", keep=1)
    loaded = latest_checkpoint(tmp_path, "digest")
    assert loaded is not None
    assert [(b.round, b.validation) for b in loaded.best if b] == [
        (3, {"a": (1.75, 3)}),
        (1, {"a": (1.0, 3)}),
    ]
    for mine, theirs in zip(loaded.best_adapters, last.best_adapters, strict=True):
        assert all(mine[name].tobytes() == theirs[name].tobytes() for name in theirs)
    assert list(run_rounds(Judged([]), assignments, loaded, settings)) == []
