"""Read the clients' records from the configured sources."""

from collections import Counter
from collections.abc import Mapping

from fedrouter import data
from fedrouter.builtin import is_builtin
from fedrouter.config import Config
from fedrouter.errors import DataError
from fedrouter.layout import number_of
from fedrouter.partition import partition
from fedrouter.types import A_NAME, Record, is_label


def load_clients(config: Config, say: data.Say = data.LOG.warning) -> dict[str, list[Record]]:
    """Return each client's records; see ``read_clients``."""
    return read_clients(config, say)[0]


def read_clients(
    config: Config, say: data.Say = data.LOG.warning
) -> tuple[dict[str, list[Record]], list[data.Read]]:
    """Read or partition the data as configured; return each client's records, and the files as read.

    Parameters
    ----------
    say : called with a line on everything that is not read.
    """
    settings = config.data
    if settings.clients:
        return _read_sources(settings.clients, config, settings.max_per_client, say)
    reads: list[data.Read] = []
    sources = [settings.source] if isinstance(settings.source, str) else settings.source
    for source in sources:
        if is_builtin(source):
            rows = data.builtin_records(source, settings.split, settings.num_per_task, config.seed)
            reading = data.Reading(num_rows=len(rows), forms=Counter({"built-in": len(rows)}))
            reads.append(data.Read(source, rows, reading))
        else:
            reads += data.read_source(
                source, settings.split, fields=settings.fields, ignore=settings.ignore, say=say
            )
    records = [r for read in reads for r in read.records]
    clients = partition(
        records,
        settings.partition,
        settings.num_clients,
        config.seed,
        settings.alpha,
        max_per_client=settings.max_per_client,
    )
    for name, rows in clients.items():
        check_size(
            name, len(rows), config.privacy.min_cluster_size, f"{number_of(len(rows), 'row')} in data.source"
        )
    _say_unused("", len(records), sum(map(len, clients.values())), say)
    return clients, reads


def load_sources(
    sources: Mapping[str, str], config: Config, limit: int | None = None, say: data.Say = data.LOG.warning
) -> dict[str, list[Record]]:
    """Return the records of clients with one source each, sorted by name.

    Raises
    ------
    DataError
        If a client has too few rows for ``privacy.min_cluster_size``, or an invalid name.
    """
    for name in sources:
        if not is_label(name):
            raise DataError(f"client {name!r}: {A_NAME}")
    return _read_sources(sources, config, limit, say)[0]


def _read_sources(
    sources: Mapping[str, str], config: Config, limit: int | None, say: data.Say
) -> tuple[dict[str, list[Record]], list[data.Read]]:
    settings, least = config.data, config.privacy.min_cluster_size
    by_client = {
        name: data.read_source(source, settings.split, settings.fields, settings.ignore, say)
        for name, source in sorted(sources.items())
    }
    records = {}
    for name, reads in by_client.items():
        rows = [r for read in reads for r in read.records]
        records[name] = rows[:limit]
        found = f"{number_of(len(rows), 'row')} in {sources[name]}"
        if len(rows) > len(records[name]):
            found = f"data.max_per_client = {limit} leaves it {limit} of {found}"
        check_size(name, len(records[name]), least, found)
        _say_unused(f"client {name}: ", len(rows), len(records[name]), say)
    return records, [read for reads in by_client.values() for read in reads]


def _say_unused(whose: str, num_rows: int, num_used: int, say: data.Say) -> None:
    if num_used < num_rows:
        unused = f"{num_rows - num_used} of {num_rows} rows"
        say(f"{whose}{unused} are used by nobody: data.max_per_client limits them")


def check_size(client: str, num_rows: int, least: int, found: str) -> None:
    """Raise DataError if a client has too few rows for ``privacy.min_cluster_size``.

    Parameters
    ----------
    found : the rows and where they are, for people.
    """
    if num_rows < max(2, least):
        raise DataError(
            f"client {client}: {found}; with privacy.min_cluster_size = {least} it needs at least "
            f"{max(2, least)}"
        )
