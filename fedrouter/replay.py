"""Replay of a decision log with another bundle, to see which decisions change."""

import asyncio
import base64
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedrouter import conversation
from fedrouter.bundle import Bundle
from fedrouter.bundle.files import first_problem
from fedrouter.decide import NO_TEXT, difference, without_text
from fedrouter.embed import Embedder
from fedrouter.errors import DataError, first_line
from fedrouter.layout import Whole
from fedrouter.route import Router
from fedrouter.types import Array, Decision, LoggedDecision

LINE = TypeAdapter(LoggedDecision)
DIFFERENCES = ("same", "moved", "rejected", "accepted")
DAMAGED = "damaged lines"


@dataclass(slots=True)
class Replay:
    """How a bundle's decisions differ from those in a log."""

    log: str
    bundle: str
    num_decided: int = 0
    # decisions that were replayed
    differences: dict[str, Counter[str]] = field(default_factory=dict)
    # counts of DIFFERENCES by the log's task cluster; prompts without text are under ""
    moved: Counter[tuple[str, str]] = field(default_factory=Counter)
    # (log's task cluster, bundle's task cluster)
    num_skipped: Counter[str] = field(default_factory=Counter)
    # by reason
    first_damaged: str | None = None
    # place and problem of the first damaged line

    def on_damaged(self, problem: str) -> None:
        """Count a damaged line."""
        self.num_skipped[DAMAGED] += 1
        self.first_damaged = self.first_damaged or problem

    def total(self, difference: str) -> int:
        """Return the number of decisions with this difference."""
        return sum(counts[difference] for counts in self.differences.values())

    def to_json(self) -> dict[str, Any]:
        """Return the replay as a JSON object."""
        return {
            "log": self.log,
            "bundle": self.bundle,
            "decided": self.num_decided,
            **{name: self.total(name) for name in DIFFERENCES},
            "by_cluster": {name: dict(counts) for name, counts in sorted(self.differences.items())},
            "moved_to": [
                {"from": first, "to": second, "decisions": number}
                for (first, second), number in self.moved.most_common()
            ],
            "skipped": dict(self.num_skipped),
            "first_damaged": self.first_damaged,
        }


def replay(log: Path, bundle: Bundle, embedder: Embedder) -> Replay:
    """Route a log's prompts with another bundle.

    Uses the texts if the log has them (``--log-prompts``), else the vectors (``--log-vectors``), if the
    bundle's embedder made them. A named caller is routed among its own task clusters only. Damaged lines are
    skipped and counted: a server that dies while the disk is full leaves a cut line.

    Raises
    ------
    DataError
        If the log cannot be read, has no valid line, or has neither texts nor vectors.
    """
    found = Replay(str(log), str(bundle.path))
    routers: dict[str | None, Router] = {None: Router(bundle)}
    clients = {client for cluster in bundle.clusters for client in cluster.clients}
    is_empty = True
    for line in read_log(log, found.on_damaged):
        is_empty = False
        if line.caller is not None and line.caller not in clients:
            found.num_skipped["client unknown to the bundle"] += 1
            continue
        if line.reason == "overload":
            found.num_skipped["overload"] += 1
            continue
        if line.caller not in routers:
            routers[line.caller] = Router(bundle, client=line.caller)
        second = _replayed(line, routers[line.caller], embedder, bundle)
        if isinstance(second, str):
            found.num_skipped[second] += 1
            continue
        changed = difference(_logged(line), second)
        found.num_decided += 1
        found.differences.setdefault(line.cluster, Counter())[changed] += 1
        if changed == "moved":
            found.moved[line.cluster, second.cluster] += 1
    if is_empty:
        raise DataError(found.first_damaged or f"{log}: contains no decisions")
    if not found.num_decided and found.num_skipped["neither texts nor vectors"]:
        raise DataError(
            f"{log}: contains neither texts nor vectors of prompts, so nothing can be replayed; "
            "log them with fedrouter serve --log-vectors or --log-prompts"
        )
    return found


def read_log(log: Path, on_damaged: Callable[[str], None]) -> Iterator[LoggedDecision]:
    """Yield the decisions of a log and of its rotated files, the oldest first.

    Parameters
    ----------
    on_damaged : called with place and problem of each damaged line.

    Raises
    ------
    DataError
        If there is no such log, or it cannot be read.
    """
    if log.is_dir():
        raise DataError(f"{log}: a directory; give the log file in it")
    older = [log.with_name(f"{log.name}.{number}") for number in range(99, 0, -1)]
    files = [file for file in [*older, log] if file.exists()]
    if not files:
        raise DataError(f"{log}: no such file")
    for file in files:
        try:
            with file.open("rb") as lines:
                for number, line in enumerate(map(bytes.strip, lines), start=1):
                    try:
                        if line and not _is_feedback(line):
                            yield _parsed(line)
                    except ValueError as error:
                        on_damaged(f"{file}, line {number}: not a line of a decision log: {_problem(error)}")
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from error


def render(found: Replay) -> RenderableType:
    """Format the replay for a terminal."""
    table = Table("task cluster", title="replayed decisions by the log's task cluster")
    for name in DIFFERENCES:
        table.add_column(name, justify="right")
    for cluster, counts in sorted(found.differences.items()):
        table.add_row(Text(cluster or "(no text)"), *(str(counts[name]) for name in DIFFERENCES))
    lines = [Text(f"{found.num_decided} decisions of {found.log}, with {found.bundle}")]
    lines.append(
        Text(
            f"changed adapter {found.total('moved')}, newly rejected {found.total('rejected')}, "
            f"newly accepted {found.total('accepted')}, the same {found.total('same')}"
        )
    )
    lines += [Text(f"  {a} → {b}: {number}") for (a, b), number in found.moved.most_common(20)]
    for why, number in found.num_skipped.items():
        first = f"; the first: {found.first_damaged}" if why == DAMAGED else ""
        lines.append(Text(f"skipped {number}: {why}{first}"))
    return Group(Whole(table), *lines)


def _logged(line: LoggedDecision) -> Decision:
    return Decision(line.adapter, line.cluster, 0.0, line.radius, 0.0, line.fallback, {})


def _replayed(line: LoggedDecision, router: Router, embedder: Embedder, bundle: Bundle) -> Decision | str:
    """Decide as a server does; return the reason if the log does not contain enough for that."""
    if line.texts is not None:
        texts = list(reversed(line.texts))

        async def route(texts: Sequence[str]) -> list[Decision]:
            rows = iter(router.route(embedder.embed([text for text in texts if text.strip()])))
            return [next(rows) if text.strip() else without_text(router) for text in texts]

        return asyncio.run(conversation.route_by_turns([texts], route))[0]
    if line.reason == "no_text":
        return without_text(router)
    if not line.vectors or line.vectors[0] is None:
        return "neither texts nor vectors"
    first = None
    if line.embedder not in (None, bundle.embedder.digest):
        return "vectors of another embedder"
    for packed in line.vectors:
        if packed is None:
            return "an earlier turn would decide, but its vector is not in the log"
        vector = _unpacked(packed)
        if len(vector) != bundle.embedder.dim:
            return "vectors of another length than the bundle's embedder has"
        [decision] = router.route(vector[None])
        first = first or decision
        if not decision.fallback:
            return decision
    return first or NO_TEXT


def _is_feedback(line: bytes) -> bool:
    value = from_json(line)
    return isinstance(value, dict) and "feedback" in value


def _parsed(line: bytes) -> LoggedDecision:
    """Parse a line; raise ValueError if it is damaged."""
    found = LINE.validate_json(line)
    for number, vector in enumerate(found.vectors or ()):
        if vector is not None and not _is_packed(vector):
            raise ValueError(f"vectors.{number}: not base64 of finite float16 values")
    return found


def _problem(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        return first_problem(error)
    return first_line(error).replace(" at line 1 column ", " at column ")  # the file's line is named already


def _is_packed(text: str) -> bool:
    try:
        return bool(np.isfinite(_unpacked(text)).all())
    except ValueError:
        return False


def _unpacked(packed: str) -> Array:
    return np.frombuffer(base64.b64decode(packed, validate=True), dtype="<f2").astype(np.float32)
