"""Results as JSON Lines, one line per cell."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedrouter.errors import DataError
from fedrouter.files import write_atomically

Line = dict[str, Any]
RESULTS = "results.jsonl"
METRICS = {"rouge_1": "ROUGE-1", "rouge_l": "ROUGE-L", "exact_match": "exact match"}
BEYOND = ("base", "nearest", "generalist", "composed")  # policies for prompts beyond the radius


def read_results(path: Path) -> dict[str, Line]:
    """Return the lines of a results file by cell, the last line of each cell.

    A truncated line at the end of the file is ignored.

    Raises
    ------
    DataError
        If another line is invalid.
    """
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    found: dict[str, Line] = {}
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            found[line["key"]] = line
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                continue
            raise DataError(f"{path}:{number}: not a line of an experiment's results") from error
    return found


def write_results(path: Path, lines: Mapping[str, Line]) -> None:
    """Write all lines atomically, sorted by cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(f"{json.dumps(lines[key])}\n" for key in sorted(lines)))
