"""Clustering again between rounds, on blobs whose tasks are known."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import PullFederation, adapter
from hypothesis import given
from hypothesis import strategies as st

from fedrouter.config import Config
from fedrouter.train.disk.checkpoint import latest_clustering, save_checkpoint
from fedrouter.train.server.describe import describe
from fedrouter.train.server.discover import discover
from fedrouter.train.server.recluster import changes, matched, recluster
from fedrouter.train.state import Clustering, RunState, fresh_state
from fedrouter.types import Array

DIM, ROWS = 64, 90
CONFIG = Config()


def blob(task: int, seed: int) -> Array:
    centre = np.random.default_rng(task).normal(size=DIM) * 8
    return (centre + np.random.default_rng([task, seed]).normal(size=(ROWS, DIM))).astype(np.float32)


def federation(tasks: Mapping[str, list[int]]) -> PullFederation:
    """Make clients that hold rows of the given tasks."""
    rows = {c: np.concatenate([blob(t, i) for t in own]) for i, (c, own) in enumerate(tasks.items())}
    return PullFederation(rows, {})


def first(clients: PullFederation) -> tuple[Clustering, RunState]:
    space = discover(clients, CONFIG.cluster, CONFIG.seed)
    assignments = clients.assign(space)
    num = len(set(space.cluster_of))
    state = replace(
        fresh_state([adapter(k) for k in range(num)]), number=3, losses=tuple(map(float, range(num)))
    )
    return Clustering(space, assignments, describe(assignments, num, CONFIG.routing)), state


def members(clustering: Clustering) -> dict[str, set[str]]:
    return {c.name: set(c.clients) for c in clustering.clusters}


BEFORE = {"a": [0, 1], "b": [1, 2], "c": [2, 0], "d": [0, 1]}


def test_unchanged_rows_give_unchanged_task_clusters() -> None:
    old, state = first(federation(BEFORE))
    new, after = recluster(federation(BEFORE), CONFIG, old, state)
    assert [c.name for c in new.clusters] == [c.name for c in old.clusters]
    assert members(new) == members(old)
    assert after == state
    assert changes(old, new) == "nothing has changed"


def test_a_client_with_changed_rows_moves_and_names_stay() -> None:
    old, state = first(federation(BEFORE))
    new, after = recluster(federation({**BEFORE, "d": [2, 1]}), CONFIG, old, state)
    holders = {name: clients - {"d"} for name, clients in members(old).items()}
    assert {name: clients - {"d"} for name, clients in members(new).items()} == holders
    of_task_0 = next(name for name, clients in holders.items() if clients == {"a", "c"})
    assert "d" in members(old)[of_task_0]
    assert "d" not in members(new)[of_task_0]
    assert changes(old, new) == "moved: d"
    # Names and adapters stay together whatever the order of discovery.
    kept = dict(zip([c.name for c in old.clusters], state.adapters, strict=True))
    assert all(kept[c.name] is a for c, a in zip(new.clusters, after.adapters, strict=True))


def test_a_new_task_starts_from_the_generalist_and_an_old_one_ends() -> None:
    old, state = first(federation(BEFORE))
    now = {"a": [0, 5], "b": [0, 2], "c": [2, 5], "d": [0, 2]}  # task 5 replaces task 1
    new, after = recluster(federation(now), CONFIG, old, state)
    gone = next(name for name, clients in members(old).items() if clients == {"a", "b", "d"})
    (fresh,) = members(new).keys() - members(old).keys()
    assert members(new)[fresh] == {"a", "c"}
    assert new.ended == (gone,)
    assert members(old).keys() - members(new).keys() == {gone}
    adapters = dict(zip(members(new), after.adapters, strict=True))
    weights = [c.num_examples for c in old.clusters]
    for name, array in adapters[fresh].items():
        want = np.average([a[name] for a in state.adapters], axis=0, weights=weights)
        np.testing.assert_allclose(array, want, rtol=1e-5, atol=1e-6)
    assert dict(zip(members(new), after.losses, strict=True))[fresh] is None

    again, _ = recluster(federation(BEFORE), CONFIG, new, after)  # the task comes back, under a new name
    assert gone not in members(again)
    assert len(again.clusters) == 3
    assert set(again.ended) == {gone, fresh}


def test_the_old_space_stays_if_there_are_too_few_rows() -> None:
    old, state = first(federation(BEFORE))
    few = federation(BEFORE)
    few.vectors = {c: x[:2] for c, x in few.vectors.items()}
    new, after = recluster(few, Config.model_validate({"cluster": {"global": 40}}), old, state)
    np.testing.assert_array_equal(new.space.centroids, old.space.centroids)
    assert [c.name for c in new.clusters] == [c.name for c in old.clusters]
    assert after.adapters == state.adapters


@given(
    shared=st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 50), min_size=n, max_size=n), min_size=1, max_size=4)
    ),
    beyond=st.integers(0, 30),
)
def test_no_old_task_cluster_is_continued_twice_and_only_where_rows_are_shared(
    shared: list[list[int]], beyond: int
) -> None:
    table = np.array(shared, dtype=float)
    rows = table.sum(0) + beyond
    of, start = matched(table, rows)
    continued = [o for o in of if o is not None]
    assert len(set(continued)) == len(continued)
    for k, (o, s) in enumerate(zip(of, start, strict=True)):
        new = table[:, k].sum() == 0 or 2 * table[:, k].sum() < rows[k]
        assert (s is None) == new
        assert o is None or (table[o, k] > 0 and s == o)
    stays = sum(table[o, k] for k, o in enumerate(of) if o is not None)
    greedy = max(
        (table[o, k] for o in range(len(table)) for k in range(len(rows)) if start[k] is not None), default=0
    )
    assert stays >= greedy


def test_a_split_task_cluster_continues_in_its_larger_half() -> None:
    of, start = matched(np.array([[60.0, 40.0, 0.0], [0.0, 0.0, 10.0]]), np.array([60.0, 40.0, 50.0]))
    assert of == [0, None, None]
    assert start == [0, 0, None], "the smaller half starts from the adapter, the new task from the generalist"


def test_a_checkpoint_keeps_the_task_clusters(tmp_path: Path) -> None:
    old, state = first(federation(BEFORE))
    assert latest_clustering(tmp_path) is None
    save_checkpoint(tmp_path, state, "digest", 2, replace(old, ended=("gone",)))
    found = latest_clustering(tmp_path)
    assert found is not None
    clustering, loaded = found.clustering, found.state
    assert (found.digest, loaded.number, clustering.ended) == ("digest", 3, ("gone",))
    assert list(clustering.clusters) == list(old.clusters)
    for field in ("mean", "transform", "centroids"):
        assert getattr(clustering.space, field).tobytes() == getattr(old.space, field).tobytes()
    assert clustering.space.cluster_of == old.space.cluster_of
    (tmp_path / "round-00002" / "space.safetensors").write_bytes(b"damaged")
    assert latest_clustering(tmp_path) is None


@pytest.mark.parametrize("every", [{"every": 2}, {"every": 1, "global": 4}])
def test_reclustering_needs_a_file_for_each_client(every: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"cluster\.every reads the clients' files again"):
        Config.model_validate({"cluster": every})
    assert Config.model_validate({"cluster": every, "data": {"clients": {"a": "a.jsonl"}}}).cluster.every
