"""The baselines with clients whose tasks are known, without a model."""

import numpy as np
import pytest
from fakes import LetterEmbedder, PullFederation, adapter

from fedrouter.config import ClusterSettings, Config, Count, TrainSettings
from fedrouter.errors import TrainingError
from fedrouter.train.client.client import Client
from fedrouter.train.lora import stack
from fedrouter.train.server.loop import run_rounds
from fedrouter.train.server.methods import finish, group, group_clients
from fedrouter.train.space import nearest
from fedrouter.types import (
    AdapterState,
    Array,
    Assignment,
    LocalClusters,
    Membership,
    Record,
    RoutingSpace,
    TaskCluster,
    Turn,
)

TASKS = {"north": ("aa", "bb"), "south": ("bb", "aa"), "east": ("cc", "cc")}


class Federation(PullFederation):
    """Real clients with letters as prompts, but with the fake's training."""

    def __init__(self, targets: dict[str, AdapterState], labelled: bool = True):
        super().__init__({}, targets)
        self.clients = {
            name: Client(
                name, [record(task, i, labelled) for i in range(8) for task in tasks], LetterEmbedder(), 0
            )
            for name, tasks in TASKS.items()
        }

    def summarise(self, num: Count, completions: bool = False) -> list[LocalClusters]:
        return [client.summarise(num) for client in self.clients.values()]

    def regroup(self, space: RoutingSpace, told: Membership | None = None) -> list[LocalClusters]:
        return [client.regroup(space, told) for client in self.clients.values()]

    def assign(self, space: RoutingSpace, told: Membership | None = None) -> list[Assignment]:
        return [client.assign(space, told) for client in self.clients.values()]


def record(task: str, i: int, labelled: bool) -> Record:
    return Record((Turn("user", task * (3 + i % 3)),), "x", task[0] if labelled else None)


@pytest.fixture
def federation() -> Federation:
    """North and south have the same target adapter, east has another."""
    pull = {"north": adapter(1), "south": adapter(1), "east": adapter(2)}
    return Federation(pull)


def config(method: str, **cluster_settings: object) -> Config:
    proximal = {"proximal": 0.1} if method == "fedprox" else {}
    return Config(
        method=method,
        train=TrainSettings(rounds=3, steps=4, **proximal),
        cluster=ClusterSettings.model_validate(cluster_settings),
    )


def members(found: list[Assignment]) -> dict[str, dict[int, int]]:
    return {a.client: {s.cluster: s.num_examples for s in a.subsets} for a in found}


EVERY = {"north": 16, "south": 16, "east": 16}


@pytest.mark.parametrize(
    ("method", "names", "want"),
    [
        ("fedavg", ("all",), {c: {0: 16} for c in EVERY}),
        ("fedprox", ("all",), {c: {0: 16} for c in EVERY}),
        ("local", ("north", "south", "east"), {"north": {0: 16}, "south": {1: 16}, "east": {2: 16}}),
        ("oracle", ("a", "b", "c"), {"north": {0: 8, 1: 8}, "south": {0: 8, 1: 8}, "east": {2: 16}}),
        ("clustered", ("group-0", "group-1"), {"north": {0: 16}, "south": {0: 16}, "east": {1: 16}}),
        (
            "feddpa",
            ("north", "south", "east"),
            {"north": {0: 16, 3: 16}, "south": {1: 16, 3: 16}, "east": {2: 16, 3: 16}},
        ),
    ],
)
def test_which_client_trains_which_adapter(
    federation: Federation, method: str, names: tuple[str, ...], want: dict[str, dict[int, int]]
) -> None:
    settings = config(method, **({"global": 2} if method == "clustered" else {}))
    found = group(federation, settings, adapter(0), 8)
    assert found.names == names
    assert members(found.assignments) == want
    assert set(found.space.cluster_of) == set(range(len(names)))
    assert found.state.number == (1 if method == "clustered" else 0)
    last = list(run_rounds(federation, found.assignments, found.state, settings))[-1].state
    assert last.number == 3
    assert all(loss is not None for loss in last.losses)


def test_a_prompt_is_routed_to_the_nearest_task_or_client(federation: Federation) -> None:
    for method, texts in {
        "oracle": ["aaaaaaaa", "bbbbbbbb", "cccccccc"],
        "local": ["aaaabbbb", "", "cccccccc"],
    }.items():
        space = group(federation, config(method), adapter(0), 8).space
        for k, text in enumerate(texts):
            if text:
                found, _ = nearest(LetterEmbedder().embed([text]), space)
                owner = space.cluster_of[int(found[0])]
                assert owner == k or (method == "local" and {owner, k} == {0, 1}), (method, text)


def test_clustered_continues_from_the_warm_up(federation: Federation) -> None:
    found = group(federation, config("clustered", **{"global": 2}), adapter(0), 8)
    assert found.state.adapters[0] is found.state.adapters[1]
    assert any(not np.array_equal(a, adapter(0)[n]) for n, a in found.state.adapters[0].items())
    automatic = group(federation, config("clustered"), adapter(0), 8)
    assert automatic.names == ("group-0", "group-1"), "two of three clients have the same target"


def test_oracle_needs_labels() -> None:
    with pytest.raises(TrainingError, match="needs a task label on every row; 16 rows of client north"):
        group(Federation({}, labelled=False), config("oracle"), adapter(0), 8)


def test_groups_follow_direction_not_length() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 50))
    updates = [
        scale * base + 0.05 * rng.normal(size=50)
        for base, scale in ((one, 9), (other, 1), (one, 1), (other, 9))
    ]
    assert group_clients(updates, 2).tolist() == [0, 1, 0, 1]
    assert group_clients(updates, "auto").tolist() == [0, 1, 0, 1]
    assert group_clients(updates, 1).tolist() == [0, 0, 0, 0]
    with pytest.raises(TrainingError, match="5 groups but only 4 clients"):
        group_clients(updates, 5)


def product(state: AdapterState) -> Array:
    (a,), (b,) = ([v for n, v in state.items() if kind in n] for kind in ("lora_A", "lora_B"))
    return b @ a


def test_feddpa_mixes_exactly_at_twice_the_rank_and_its_generalist_is_the_global_adapter(
    federation: Federation,
) -> None:
    settings = config("feddpa")
    found = group(federation, settings, adapter(0), 8)
    state = list(run_rounds(federation, found.assignments, found.state, settings))[-1].state
    made = finish(settings, state, [], {"r": 8, "lora_alpha": 16})
    adapters, generalist, written = made.adapters, made.generalist, made.adapter_config
    *own, shared = state.adapters
    for mixed, mine in zip(adapters, own, strict=True):
        np.testing.assert_allclose(
            product(mixed), (product(shared) + product(mine)) / 2, rtol=1e-4, atol=1e-5
        )
    assert generalist is not None
    np.testing.assert_allclose(product(generalist), product(shared), rtol=1e-4, atol=1e-5)
    assert written == {"r": 16, "lora_alpha": 32}


@pytest.mark.parametrize(("method", "has"), [("local", False), ("fedavg", False), ("oracle", True)])
def test_which_methods_have_a_generalist(federation: Federation, method: str, has: bool) -> None:
    state = group(federation, config(method), adapter(0), 8).state
    clusters = [TaskCluster(str(k), "", 10, (), {}, 1.0) for k in range(len(state.adapters))]
    assert (finish(config(method), state, clusters, {}).generalist is not None) == has


def test_stacking_equals_the_dense_sum() -> None:
    states: list[AdapterState] = [adapter(i) for i in range(3)]

    want = sum(w * product(s) for w, s in zip((0.2, 0.3, 0.5), states, strict=True))
    np.testing.assert_allclose(product(stack(states, (0.2, 0.3, 0.5))), want, rtol=1e-4, atol=1e-5)
