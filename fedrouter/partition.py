"""Records dealt out to clients: the paper's scenarios, blindly, or by Dirichlet proportions."""

import math
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import cast

import numpy as np
from numpy.typing import NDArray

from fedrouter.errors import ConfigError, DataError
from fedrouter.types import Record

MIN_PER_CLIENT = 2  # one row cannot be clustered
MAX_DRAWS = 100  # of Dirichlet proportions, until every client has rows

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
    """Deal records out to clients ``client-0``, ``client-1`` …; every row goes to exactly one.

    With the tasks in the order in which they first appear and T of them, client c holds task ``c mod T``
    (*single*), also task ``c + 1 mod T`` (*dual*), or every task (*all*); a task's rows are shared evenly
    by those that hold it. *iid* ignores the tasks. *dirichlet* shares each task's rows in proportions drawn
    from Dir(alpha), drawn again while a client has too few. A client keeps its rows in their first order.

    Parameters
    ----------
    scheme : str
        ``single``, ``dual``, ``all``, ``iid`` or ``dirichlet``.
    seed : int
        The same seed gives the same partition.
    alpha : float
        Concentration of ``dirichlet``, above 0; smaller is more uneven.
    max_per_client : int, optional
        Cap on a client's rows; a random part of them stays, the others are used by nobody.
    task_of : callable, optional
        Gives a record's task label.

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
                f"partition {scheme!r} gives {name} {len(kept)} of {len(records)} rows, each client needs "
                f"{MIN_PER_CLIENT}: use fewer clients, more rows or, for dirichlet, a larger alpha"
            )
        clients[name] = [records[row] for row in sorted(kept)]
    return clients


def _rows_by_task(
    records: Sequence[Record], scheme: str, task_of: Callable[[Record], str | None]
) -> dict[str, Rows]:
    rows: dict[str | None, list[int]] = {}
    for row, record in enumerate(records):
        rows.setdefault(task_of(record), []).append(row)
    if None in rows:
        raise DataError(
            f"partition {scheme!r} needs a task label in every row, {len(rows[None])} of {len(records)} have "
            "none: add the field task, or use partition 'iid'"
        )
    return {cast(str, task): np.array(own) for task, own in rows.items()}


def _holders(scheme: str, tasks: Sequence[str], num_clients: int) -> list[list[int]]:
    """Return the clients that hold each task."""
    num_held = _TASKS_PER_CLIENT.get(scheme, len(tasks))
    if num_held > len(tasks):
        raise DataError(
            f"partition {scheme!r} needs at least {num_held} tasks, "
            f"the rows have {len(tasks)}: {', '.join(tasks) or 'no rows'}"
        )
    holders: list[list[int]] = [[] for _ in tasks]
    for client in range(num_clients):
        for next_task in range(num_held):
            holders[(client + next_task) % len(tasks)].append(client)
    idle = [task for task, held_by in zip(tasks, holders, strict=True) if not held_by]
    if idle:
        raise DataError(
            f"partition {scheme!r} over {num_clients} clients leaves tasks without a client: "
            f"{', '.join(idle)}; use at least {len(tasks) - num_held + 1} clients"
        )
    return holders


def _deal(
    tasks: Sequence[Rows], holders: Sequence[Sequence[int]], num_clients: int, rng: np.random.Generator
) -> list[list[int]]:
    """Deal each task's rows, shuffled, in turns to its holders."""
    owned: list[list[int]] = [[] for _ in range(num_clients)]
    turn = 0  # goes on from task to task, so that the first holders do not get every remainder
    for rows, clients in zip(tasks, holders, strict=True):
        for row in rng.permutation(rows):
            owned[clients[turn % len(clients)]].append(int(row))
            turn += 1
    return owned


def _dirichlet(
    tasks: Mapping[str, Rows], num_clients: int, alpha: float, rng: np.random.Generator
) -> list[list[int]]:
    """Share each task's rows in random proportions; the last draw is returned even if it is too uneven."""
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
