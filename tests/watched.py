"""A small federation that records every message, and the list in docs/privacy.md to compare them with."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fakes import adapter

from fedrouter.config import Config, PrivacySettings, TrainSettings
from fedrouter.train.client.client import Client
from fedrouter.train.federation import FEW
from fedrouter.train.local import LocalFederation
from fedrouter.train.server.loop import run_rounds
from fedrouter.train.server.methods import group
from fedrouter.types import AdapterState, Array, EmbedderSpec, Float64s, Record, RoutingSpace, Turn

DOC = Path(__file__).parents[1] / "docs" / "privacy.md"
DIM, NUM_ROWS, TASKS = 62, 60, ("colours", "numbers")
CONFIG = Config(train=TrainSettings(rounds=3, steps=4, validation=0.2))


class TaskEmbedder:
    """A text's first word determines the place of its vector, the rest a deviation."""

    spec = EmbedderSpec("base", "words", 1, 512, "float32", DIM, "words")

    def embed(self, texts: Sequence[str]) -> Array:
        return np.array([self._near(t.split()[0]) + self._noise(t) for t in texts], dtype=np.float32)

    def _near(self, word: str) -> Float64s:
        return 6 * self._noise(word)

    def _noise(self, text: str) -> Float64s:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
        return np.random.default_rng(seed).normal(size=DIM)


@dataclass(frozen=True)
class Trained:
    adapter: AdapterState
    num_examples: int
    loss: float
    seconds: float


class Trainer:
    """Moves every weight by a number that depends on the rows."""

    validation, batch_size = 0.2, 4

    def __init__(self, trained: list[str] | None = None):
        self.trained = trained or sorted(adapter(0))

    def tokenise(self, records: list[Record]) -> list[Record]:
        return records

    def train(self, state: AdapterState, rows: list[Record], steps: int, rate: float, seed: int) -> Trained:
        if any("poison" in r.completion for r in rows):
            raise ValueError(f"cannot tokenise {rows[0].turns[0].content!r}")
        step = np.float32(len("".join(r.completion for r in rows)) % 7 + 1) / 10
        moved = {n: a + step * (n in self.trained) for n, a in state.items()}
        return Trained(moved, steps * self.batch_size, 1.0, 0.1)

    def loss(self, state: AdapterState, rows: list[Record]) -> tuple[float, int]:
        return float(len(rows)), 10 * len(rows)


def rows(client: int, num: int = NUM_ROWS, tasks: tuple[str, ...] = TASKS) -> list[Record]:
    return [
        Record((Turn("user", f"{task} secret{client}x{i}"),), f"answer-{task} hidden{client}x{i}", task)
        for task in tasks
        for i in range(num)
    ]


def clients(num: int = NUM_ROWS, privacy: PrivacySettings | None = None, key: bytes = b"k") -> list[Client]:
    names = ("ulm", "bern", "graz")
    return [Client(n, rows(i, num), TaskEmbedder(), 0, privacy, key) for i, n in enumerate(names)]


class Watched:
    """A federation that records every message together with the server's request."""

    def __init__(self, members: list[Client], trainer: Trainer | None = None):
        self.inner = LocalFederation(members, trainer or Trainer())  # type: ignore[arg-type]
        self.seen: list[tuple[str, tuple[Any, ...], Any]] = []

    def __getattr__(self, name: str) -> Any:
        def ask(*arguments: Any, **named: Any) -> Iterator[Any]:
            for message in getattr(self.inner, name)(*arguments, **named):
                self.seen.append((name, arguments, message))
                yield message

        lists = ("assign", "members", "compare", "reread")
        return lambda *args, **named: list(ask(*args, **named)) if name in lists else ask(*args, **named)

    def names(self) -> list[str]:
        return [name for name, _, _ in self.seen]


def listed() -> set[tuple[str, str]]:
    """Return (message, field) of the table in docs/privacy.md."""
    return set(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", DOC.read_text(encoding="utf-8"), re.MULTILINE))


def leaves(message: Any, path: tuple[tuple[str, str], ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Yield ((message, field), value) of every field in a message, at any depth."""
    if is_dataclass(message):
        for f in fields(message):
            here = (type(message).__name__, f.name)
            value = getattr(message, f.name)
            if isinstance(value, tuple) and value and is_dataclass(value[0]):
                yield here, None
                for part in value:
                    yield from leaves(part)
            else:
                yield here, value
    else:
        raise AssertionError(f"{type(message)} is not listed in docs/privacy.md")


def inspect(
    federation: Watched, members: list[Client], least: int = 5, seen: list[Any] | None = None
) -> set[tuple[str, str]]:
    """Check every recorded message, or the given ones; return the fields that occurred."""
    messages = federation.seen if seen is None else seen
    found, names = set(), {c.name for c in members}
    vectors = np.concatenate([c._vectors for c in members]).astype(float)
    for _, asked, message in messages:
        spaces = [a for a in asked if isinstance(a, RoutingSpace)]
        hidden = [vectors]
        hidden += [(vectors - space.mean) @ space.transform for space in spaces]
        for key, value in leaves(message):
            found.add(key)
            match value:
                case np.ndarray():
                    assert all(num % len(c._records) for num in value.shape for c in members), key
                    assert not holds_row(value, hidden), f"{key} is the vector of a row"
                case str() if key[1] in ("reason", "problem"):
                    assert not re.search("secret|hidden|answer", value)
                case str() if key[1] == "digest":
                    assert re.fullmatch("[0-9a-f]{32}", value)
                case str():
                    assert value in names, key
                case dict() if key[1] == "within":
                    assert all(isinstance(k, int) and n >= least for k, n in value.items())
                case dict():
                    allowed = {*TASKS, "gulls", FEW} if key[1] == "task_counts" else set(adapter(0))
                    assert set(value) <= allowed, key
                    assert key[1] != "task_counts" or all(n >= least for k, n in value.items() if k != FEW)
                    assert all(isinstance(v, int) or v.size < 100 for v in value.values())
                case None | int() | float() | np.floating() | ():
                    pass
                case _:
                    raise AssertionError(f"{key}: {value!r} is of no listed kind")
            if key[1] in ("counts", "num_examples", "num_beyond") and key[0] != "TrainReply":
                counts = np.atleast_1d(value)
                assert (counts[counts > 0] >= least).all(), f"{key} tells of fewer than {least} rows"
    return found


def holds_row(value: np.ndarray, hidden: list[np.ndarray]) -> bool:
    for known in hidden:
        if value.ndim and value.shape[-1] == known.shape[1]:
            found = value.reshape(-1, value.shape[-1])
            near = np.linalg.norm(found[:, None] - known[None], axis=-1)
            if (near <= 1e-4 * np.linalg.norm(known, axis=-1)).any():
                return True
    return False


def whole_run(federation: Watched, config: Config = CONFIG) -> None:
    found = group(federation, config, adapter(0), DIM)
    list(run_rounds(federation, found.assignments, found.state, config))


def same(one: Watched, other: Watched) -> bool:
    def content(federation: Watched) -> list[Any]:
        return [
            (key, value.tobytes() if isinstance(value, np.ndarray) else repr(value))
            for _, _, message in federation.seen
            for key, value in leaves(message)
        ]

    return content(one) == content(other)
