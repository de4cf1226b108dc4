"""What another bundle would have decided: a decision log, decided anew."""

import asyncio
import base64
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedrouter import conversation
from fedrouter.bundle import Bundle
from fedrouter.decide import NO_TEXT, difference, without_text
from fedrouter.embed import Embedder
from fedrouter.errors import DataError, first_line
from fedrouter.layout import Whole
from fedrouter.route import Router
from fedrouter.types import Array, Decision, LoggedDecision

LINE = TypeAdapter(LoggedDecision)
DIFFERENCES = ("same", "moved", "rejected", "accepted")


@dataclass(slots=True)
class Replay:
    """A log decided anew."""

    log: str
    bundle: str
    num_decided: int = 0
    # decisions that were made anew
    differences: dict[str, Counter[str]] = field(default_factory=dict)
    # by the task cluster of the log, how the other bundle differs; "" holds prompts without text
    moved: Counter[tuple[str, str]] = field(default_factory=Counter)
    # from task cluster to task cluster
    num_skipped: Counter[str] = field(default_factory=Counter)
    # by why they were not

    def total(self, which: str) -> int:
        """Return the number of decisions that differ so."""
        return sum(counts[which] for counts in self.differences.values())

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "log": self.log,
            "bundle": self.bundle,
            "decided": self.num_decided,
            **{which: self.total(which) for which in DIFFERENCES},
            "by_cluster": {name: dict(counts) for name, counts in sorted(self.differences.items())},
            "moved_to": [
                {"from": first, "to": second, "decisions": number}
                for (first, second), number in self.moved.most_common()
            ],
            "skipped": dict(self.num_skipped),
        }


def replay(log: Path, bundle: Bundle, embedder: Embedder) -> Replay:
    """Decide a log's prompts with another bundle.

    Texts are used where the log holds them (``--log-prompts``), else vectors (``--log-vectors``), if the
    bundle has the embedder that made them. Each caller is kept to its own task clusters, as a server does.

    Raises
    ------
    DataError
        If there is no such log, a line of it is none, or it holds neither texts nor vectors.
    """
    found = Replay(str(log), str(bundle.path))
    routers: dict[str | None, Router] = {None: Router(bundle)}
    clients = {client for cluster in bundle.clusters for client in cluster.clients}
    seen = False
    for line in read_log(log):
        seen = True
        if line.caller is not None and line.caller not in clients:
            found.num_skipped["client unknown to the bundle"] += 1
            continue
        if line.reason == "overload":
            found.num_skipped["overload"] += 1
            continue
        if line.caller not in routers:
            routers[line.caller] = Router(bundle, client=line.caller)
        second = _decide(line, routers[line.caller], embedder, bundle)
        if isinstance(second, str):
            found.num_skipped[second] += 1
            continue
        how = difference(_logged(line), second)
        found.num_decided += 1
        found.differences.setdefault(line.cluster, Counter())[how] += 1
        if how == "moved":
            found.moved[line.cluster, second.cluster] += 1
    if not seen:
        raise DataError(f"{log}: holds no decision")
    if not found.num_decided and found.num_skipped["neither texts nor vectors"]:
        raise DataError(
            f"{log}: holds neither texts nor vectors of prompts, so nothing can be decided anew; "
            "keep them with fedrouter serve --log-vectors or --log-prompts"
        )
    return found


def read_log(log: Path) -> Iterator[LoggedDecision]:
    """Yield the decisions of a log and of its older files, the oldest first.

    Raises
    ------
    DataError
        If there is none, or a line is none.
    """
    older = [log.with_name(f"{log.name}.{number}") for number in range(99, 0, -1)]
    files = [file for file in [*older, log] if file.is_file()]
    if not files:
        raise DataError(f"{log}: no such file")
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    if "feedback" not in json.loads(line):
                        yield LINE.validate_json(line)
                except (ValueError, ValidationError) as error:
                    raise DataError(
                        f"{file}, line {number}: no line of a decision log: {first_line(error)}"
                    ) from error


def render(found: Replay) -> RenderableType:
    """Lay it out for a terminal."""
    table = Table("task cluster", title="decided anew, by the log's task cluster")
    for which in DIFFERENCES:
        table.add_column(which, justify="right")
    for name, counts in sorted(found.differences.items()):
        table.add_row(Text(name or "(no text)"), *(str(counts[which]) for which in DIFFERENCES))
    lines = [Text(f"{found.num_decided} decisions of {found.log}, with {found.bundle}")]
    lines.append(
        Text(
            f"changed adapter {found.total('moved')}, newly rejected {found.total('rejected')}, "
            f"newly accepted {found.total('accepted')}, the same {found.total('same')}"
        )
    )
    lines += [Text(f"  {a} → {b}: {number}") for (a, b), number in found.moved.most_common(20)]
    lines += [Text(f"skipped {number}: {why}") for why, number in found.num_skipped.items()]
    return Group(Whole(table), *lines)


def _logged(line: LoggedDecision) -> Decision:
    return Decision(line.adapter, line.cluster, 0.0, line.radius, 0.0, line.fallback, {})


def _decide(line: LoggedDecision, router: Router, embedder: Embedder, bundle: Bundle) -> Decision | str:
    """Decide as a server does; or say why that cannot be known."""
    if line.texts is not None:
        texts = list(reversed(line.texts))

        async def embedded(asked: Sequence[str]) -> list[Decision]:
            rows = iter(router.route(embedder.embed([text for text in asked if text.strip()])))
            return [next(rows) if text.strip() else without_text(router) for text in asked]

        return asyncio.run(conversation.decide([texts], embedded))[0]
    if line.reason == "no_text":
        return without_text(router)
    if not line.vectors or line.vectors[0] is None:
        return "neither texts nor vectors"
    first = None
    for packed in line.vectors:
        if packed is None:
            return "an earlier turn would decide, and its vector is not in the log"
        vector = _unpacked(packed)
        if len(vector) != bundle.embedder.dim:
            return "vectors of another embedder"
        [decision] = router.route(vector[None])
        first = first or decision
        if not decision.fallback:
            return decision
    return first or NO_TEXT


def _unpacked(packed: str) -> Array:
    return np.frombuffer(base64.b64decode(packed), dtype="<f2").astype(np.float32)
