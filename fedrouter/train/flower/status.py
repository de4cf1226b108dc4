"""Status of a federation's clients: from the superlink, and from the last run."""

from datetime import UTC, datetime
from pathlib import Path

from fedrouter.files import read_map
from fedrouter.train.flower.federation import load_directory, nodes
from fedrouter.train.wire.keys import public_text

SEEN = "seen.json"  # in a federation's directory: rows and last reply of each client


def status(path: Path) -> list[dict[str, object]]:
    """Return one entry for each client of the roster.

    Raises
    ------
    ConfigError, DataError
        If the superlink does not answer, or ``seen.json`` is damaged.
    """
    directory = load_directory(path)
    by_key = nodes(directory)
    seen = read_map(path / SEEN, dict)
    found = []
    for name, key in directory.roster().items():
        node = by_key.get(public_text(key), {})
        state = node.get("status", "unknown to the superlink")
        last = seen.get(name, {})
        found.append(
            {
                "client": name,
                "status": state,
                "since": _shown(node.get("online" if state == "online" else "offline")),
                "rows": last.get("rows", "-"),
                "last_answer": last.get("time", "-"),
                "request": last.get("what", "-"),
            }
        )
    return found


def _shown(superlink_time: str | None) -> str:
    """Return one of the superlink's times, in ISO 8601, in the form of ``seen.json``'s."""
    if not superlink_time:
        return "-"
    moment = datetime.fromisoformat(superlink_time)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)  # the superlink's times are in UTC
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")
