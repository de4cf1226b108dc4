from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrouter.errors import ConfigError, DataError
from fedrouter.partition import partition
from fedrouter.types import Record, Turn

TASKS = ("paraphrase", "data_to_text", "dialogue_summary", "headline")


def make_records(sizes: list[int], tasks: Sequence[str] = TASKS) -> list[Record]:
    return [
        Record((Turn("user", f"{task} {row}"),), "answer", task)
        for task, size in zip(tasks, sizes, strict=False)
        for row in range(size)
    ]


def task_counts(records: Sequence[Record]) -> Counter[str | None]:
    return Counter(record.task for record in records)


sizes = st.lists(st.integers(20, 60), min_size=2, max_size=4)
schemes = st.sampled_from(["single", "dual", "all", "iid", "dirichlet"])


@given(sizes, schemes, st.integers(4, 12), st.integers(0, 2**32))
def test_every_row_goes_to_exactly_one_client(
    sizes: list[int], scheme: str, num_clients: int, seed: int
) -> None:
    records = make_records(sizes)
    clients = partition(records, scheme, num_clients, seed, alpha=1.0)
    dealt = [record for rows in clients.values() for record in rows]
    assert len(clients) == num_clients
    assert len(dealt) == len(records)
    assert {id(record) for record in dealt} == {id(record) for record in records}
    assert min(map(len, clients.values())) >= 2


@given(sizes, schemes, st.integers(0, 2**32))
def test_the_same_seed_gives_the_same_partition(sizes: list[int], scheme: str, seed: int) -> None:
    records = make_records(sizes)
    first, second, other = (partition(records, scheme, 8, s, alpha=1.0) for s in (seed, seed, seed + 1))
    assert first == second
    assert list(first) == list(second)
    assert other != first


@given(sizes, st.sampled_from(["single", "dual", "all"]), st.integers(4, 12), st.integers(0, 9))
def test_clients_hold_the_tasks_of_the_scenario_evenly(
    sizes: list[int], scheme: str, num_clients: int, seed: int
) -> None:
    tasks = TASKS[: len(sizes)]
    clients = partition(make_records(sizes), scheme, num_clients, seed)
    num_held = {"single": 1, "dual": 2, "all": len(tasks)}[scheme]
    for number, rows in enumerate(clients.values()):
        assert set(task_counts(rows)) == {tasks[(number + i) % len(tasks)] for i in range(num_held)}
    for task in tasks:
        shares = [count for rows in clients.values() if (count := task_counts(rows)[task])]
        assert max(shares) - min(shares) <= 1


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from(["iid", "all"]), st.integers(0, 9)
)
def test_few_rows_of_each_task_still_make_even_clients(sizes: list[int], scheme: str, seed: int) -> None:
    records = make_records(sizes)
    num_clients = max(1, len(records) // 3)
    if len(records) < 2:
        return
    lengths = [len(rows) for rows in partition(records, scheme, num_clients, seed).values()]
    assert max(lengths) - min(lengths) <= 1


def test_the_papers_dual_scenario() -> None:
    clients = partition(make_records([600] * 4), "dual", 8, seed=0)
    assert task_counts(clients["client-1"]) == {"data_to_text": 150, "dialogue_summary": 150}
    assert task_counts(clients["client-7"]) == {"headline": 150, "paraphrase": 150}


def test_a_client_keeps_its_rows_in_their_first_order() -> None:
    records = make_records([20] * 4)
    for rows in partition(records, "dual", 4, seed=3).values():
        positions = [records.index(record) for record in rows]
        assert positions == sorted(positions)


def test_dirichlet_is_more_uneven_with_a_smaller_alpha() -> None:
    def unevenness(alpha: float) -> float:
        clients = partition(make_records([400] * 4), "dirichlet", 4, seed=1, alpha=alpha)
        return sum(max(task_counts(rows).values()) / len(rows) for rows in clients.values()) / 4

    assert unevenness(0.05) > 0.6 > 0.3 > unevenness(1000)


def test_dirichlet_draws_again_until_every_client_has_rows() -> None:
    for seed in range(20):
        clients = partition(make_records([60] * 4), "dirichlet", 4, seed, alpha=0.1)
        assert min(map(len, clients.values())) >= 2


def test_the_cap_keeps_a_random_part() -> None:
    records = make_records([100] * 4)
    clients = partition(records, "dual", 4, seed=0, max_per_client=30)
    assert {len(rows) for rows in clients.values()} == {30}
    assert len({id(record) for rows in clients.values() for record in rows}) == 120
    counts = task_counts(clients["client-0"])
    assert min(counts["paraphrase"], counts["data_to_text"]) > 5


def test_client_names_sort_like_their_numbers() -> None:
    assert list(partition(make_records([40] * 4), "iid", 3, 0)) == ["client-0", "client-1", "client-2"]
    names = list(partition(make_records([40] * 4), "iid", 11, 0))
    assert names[0] == "client-00"
    assert names[-1] == "client-10"
    assert names == sorted(names)


def test_task_of_gives_the_labels() -> None:
    records = [Record((Turn("user", f"{row}"),), "x") for row in range(20)]
    clients = partition(
        records, "single", 2, 0, task_of=lambda record: "odd" if int(record.turns[0].content) % 2 else "even"
    )
    assert {int(record.turns[0].content) % 2 for record in clients["client-0"]} == {0}


def test_iid_needs_no_labels_and_the_others_do() -> None:
    records = [
        Record((Turn("user", f"{row}"),), "x", "a" if row else None, where=f"a.jsonl:{row + 8}")
        for row in range(20)
    ]
    assert sum(map(len, partition(records, "iid", 2, 0).values())) == 20
    for scheme in ("single", "dual", "all", "dirichlet"):
        with pytest.raises(
            DataError, match=f"partition '{scheme}' needs .* in 1 of 20, first in a.jsonl:8; add"
        ):
            partition(records, scheme, 2, 0)


@pytest.mark.parametrize(
    ("sizes", "scheme", "num_clients", "message"),
    [
        ([5], "iid", 3, "'iid' gives client-2 1 of 5 rows"),
        ([5], "dual", 2, "'dual' needs at least 2 tasks, but the rows have 1: paraphrase"),
        ([9] * 4, "single", 3, "leaves tasks without a client: headline; use at least 4 clients"),
        ([9] * 4, "dual", 2, "leaves tasks without a client: headline; use at least 3 clients"),
        ([2, 2], "dirichlet", 4, "'dirichlet' gives client-. . of 4 rows"),
        ([], "all", 2, "gives client-0 0 of 0 rows"),
        ([], "single", 2, "needs at least 1 tasks"),
    ],
)
def test_too_few_rows_tasks_or_clients(sizes: list[int], scheme: str, num_clients: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        partition(make_records(sizes), scheme, num_clients, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scheme": "triple"}, "unknown partition 'triple': choose single, dual"),
        ({"num_clients": 0}, "num_clients >= 1"),
        ({"alpha": 0.0}, "alpha > 0"),
        ({"alpha": float("nan")}, "alpha > 0"),
        ({"max_per_client": 1}, "max_per_client >= 2"),
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        partition(make_records([9] * 4), **{"scheme": "all", "num_clients": 2, "seed": 0, **wrong})
