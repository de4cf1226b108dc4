"""Partition of records among clients: the paper's scenarios, i.i.d., or in Dirichlet proportions."""

import math
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import cast

import numpy as np
from numpy.typing import NDArray

from fedrouter.errors import ConfigError, DataError
from fedrouter.types import Record

MIN_PER_CLIENT = 2  # a single row cannot be clustered
MAX_DRAWS = 100  # of Dirichlet proportions, until every client has MIN_PER_CLIENT rows

_TASKS_PER_CLIENT = {"single": 1, "dual": 2}
Rows = NDArray[np.int64]  # indices into the records


def partition(
    records: Sequence[Record],
    scheme: str,
    num_clients: int,
    seed: int,
    alpha: float = 0.5,
    max_per_client: int | None = None,
    task_of: Callable[[Record], str | None] = attrgetter("task"),
) -> dict[str, list[Record]]:
    """Partition records among clients ``client-0``, ``client-1`` …; every row goes to exactly one client.

    With T tasks, ordered by their first row, client c has task ``c mod T`` (*single*), also task
    ``c + 1 mod T`` (*dual*), or every task (*all*); a task's rows are divided evenly among its clients.
    *iid* ignores the tasks. *dirichlet* divides each task's rows in proportions drawn from Dir(alpha), and
    draws again while a client has too few rows. Each client's rows keep their order.

    Parameters
    ----------
    scheme : str
        ``single``, ``dual``, ``all``, ``iid`` or ``dirichlet``.
    seed : int
        The same seed gives the same partition.
    alpha : float
        Concentration of ``dirichlet``, above 0; smaller is more uneven.
    max_per_client : int, optional
        Maximum number of rows per client; the other rows are dropped at random.
    task_of : callable, optional
        Returns a record's task label.

    Raises
    ------
    ConfigError
        If the scheme is unknown or a number is out of range.
    DataError
        If task labels are missing, a task has no client, or a client has fewer than two rows.
    """
    if num_clients < 1 or not 0 < alpha < math.inf:
        raise ConfigError(f"partition needs num_clients >= 1 and alpha > 0, got {num_clients} and {alpha}")
    if max_per_client is not None and max_per_client < MIN_PER_CLIENT:
        raise ConfigError(f"partition needs max_per_client >= {MIN_PER_CLIENT}, got {max_per_client}")
    rng = np.random.default_rng(seed)
    if scheme == "iid":
        owned = _deal([np.arange(len(records))], [range(num_clients)], num_clients, rng)
    elif scheme == "dirichlet":
        owned = _dirichlet(_rows_by_task(records, scheme, task_of), num_clients, alpha, rng)
    elif scheme in ("single", "dual", "all"):
        tasks = _rows_by_task(records, scheme, task_of)
        owned = _deal(list(tasks.values()), _holders(scheme, list(tasks), num_clients), num_clients, rng)
    else:
        raise ConfigError(f"unknown partition {scheme!r}: choose single, dual, all, iid or dirichlet")

    width = len(str(num_clients - 1))
    clients = {}
    for number, rows in enumerate(owned):
        kept = rng.permutation(rows)[:max_per_client]
        name = f"client-{number:0{width}}"
        if len(kept) < MIN_PER_CLIENT:
            raise DataError(
                f"partition {scheme!r} gives {name} {len(kept)} of {len(records)} rows, but a client needs "
                f"{MIN_PER_CLIENT}: use fewer clients, more rows or, for dirichlet, a larger alpha"
            )
        clients[name] = [records[row] for row in sorted(kept)]
    return clients


def _rows_by_task(
    records: Sequence[Record], scheme: str, task_of: Callable[[Record], str | None]
) -> dict[str, Rows]:
    check_labels(f"partition {scheme!r}", records, "add the field task, or use partition 'iid'", task_of)
    rows: dict[str | None, list[int]] = {}
    for row, record in enumerate(records):
        rows.setdefault(task_of(record), []).append(row)
    return {cast(str, task): np.array(indices) for task, indices in rows.items()}


def check_labels(
    what: str,
    records: Sequence[Record],
    advice: str = "add the field task",
    task_of: Callable[[Record], str | None] = attrgetter("task"),
) -> None:
    """Check that every row has a task label; ``what`` needs it.

    Raises
    ------
    DataError
        If one has none; names file and row of the first.
    """
    if bare := [record for record in records if task_of(record) is None]:
        raise DataError(
            f"{what} needs a task label in every row; missing in {len(bare)} of {len(records)}, first in "
            f"{bare[0].where or 'a built-in row'}; {advice}"
        )


def _holders(scheme: str, tasks: Sequence[str], num_clients: int) -> list[list[int]]:
    """Return the clients that have each task."""
    num_tasks = _TASKS_PER_CLIENT.get(scheme, len(tasks))
    if num_tasks > len(tasks):
        raise DataError(
            f"partition {scheme!r} needs at least {num_tasks} tasks, "
            f"but the rows have {len(tasks)}: {', '.join(tasks) or 'no rows'}"
        )
    holders: list[list[int]] = [[] for _ in tasks]
    for client in range(num_clients):
        for offset in range(num_tasks):
            holders[(client + offset) % len(tasks)].append(client)
    unassigned = [task for task, clients in zip(tasks, holders, strict=True) if not clients]
    if unassigned:
        raise DataError(
            f"partition {scheme!r} over {num_clients} clients leaves tasks without a client: "
            f"{', '.join(unassigned)}; use at least {len(tasks) - num_tasks + 1} clients"
        )
    return holders


def _deal(
    tasks: Sequence[Rows], holders: Sequence[Sequence[int]], num_clients: int, rng: np.random.Generator
) -> list[list[int]]:
    """Shuffle each task's rows and give them to its holders in turn."""
    owned: list[list[int]] = [[] for _ in range(num_clients)]
    turn = 0  # continues across tasks, so that the first holders do not get every remainder
    for rows, clients in zip(tasks, holders, strict=True):
        for row in rng.permutation(rows):
            owned[clients[turn % len(clients)]].append(int(row))
            turn += 1
    return owned


def _dirichlet(
    tasks: Mapping[str, Rows], num_clients: int, alpha: float, rng: np.random.Generator
) -> list[list[int]]:
    """Divide each task's rows in random proportions; the last draw is returned even if it is too uneven."""
    owned: list[list[int]] = []
    for _ in range(MAX_DRAWS):
        owned = [[] for _ in range(num_clients)]
        for rows in tasks.values():
            shares = rng.dirichlet(np.full(num_clients, alpha))
            cuts = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(int)
            for mine, part in zip(owned, np.split(rng.permutation(rows), cuts), strict=True):
                mine.extend(part.tolist())
        if min(map(len, owned)) >= MIN_PER_CLIENT:
            break
    return owned
