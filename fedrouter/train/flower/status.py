"""Status of a federation's clients: from the superlink, and from the last run."""

import json
from pathlib import Path

from fedrouter.train.flower.federation import load_directory, nodes
from fedrouter.train.wire.keys import public_text

SEEN = "seen.json"  # in a federation's directory: rows and last reply of each client


def status(path: Path) -> list[dict[str, object]]:
    """Return one entry for each client of the roster.

    Raises
    ------
    ConfigError
        If the superlink does not answer.
    """
    directory = load_directory(path)
    by_key = nodes(directory)
    file = path / SEEN
    seen = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    found = []
    for name, key in directory.roster().items():
        node = by_key.get(public_text(key), {})
        state = node.get("status", "unknown to the superlink")
        last = seen.get(name, {})
        found.append(
            {
                "client": name,
                "there": state,
                "since": node.get("online" if state == "online" else "offline") or "-",
                "rows": last.get("rows", "-"),
                "last_answer": last.get("time", "-"),
                "to": last.get("what", "-"),
            }
        )
    return found
