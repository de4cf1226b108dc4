"""What leaves a client: every message of whole runs, held against docs/privacy.md."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import adapter, write

from fedrouter.config import ClusterSettings, Config, PrivacySettings, TrainSettings
from fedrouter.errors import DataError
from fedrouter.train import join
from fedrouter.train.client import Client
from fedrouter.train.discover import discover
from fedrouter.train.local import LocalFederation
from fedrouter.train.methods import group
from fedrouter.train.server import fresh_state, run_rounds
from fedrouter.types import AdapterState, Array, EmbedderSpec, Record, RoutingSpace, Turn

DOC = Path(__file__).parents[2] / "docs" / "privacy.md"
DIM, NUM_ROWS, TASKS = 12, 120, ("colours", "numbers")
CONFIG = Config(train=TrainSettings(rounds=3, steps=4, validation=0.2))


class TaskEmbedder:
    """A text's first word gives the place of its vector, the rest a spread of its own."""

    spec = EmbedderSpec("base", "words", 1, 512, "float32", DIM, "words")

    def embed(self, texts: list[str]) -> Array:
        return np.array([self._near(t.split()[0]) + self._noise(t) for t in texts], dtype=np.float32)

    def _near(self, word: str) -> Array:
        return 6 * self._noise(word)

    def _noise(self, text: str) -> Array:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
        return np.random.default_rng(seed).normal(size=DIM)


@dataclass(frozen=True)
class Trained:
    adapter: AdapterState
    num_examples: int
    loss: float
    seconds: float


class Trainer:
    """Moves every weight by a number that its rows decide."""

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
    """A federation whose every message is written down, with what the server had asked."""

    def __init__(self, members: list[Client], trainer: Trainer | None = None):
        self.inner = LocalFederation(members, trainer or Trainer())  # type: ignore[arg-type]
        self.seen: list[tuple[str, tuple[Any, ...], Any]] = []

    def __getattr__(self, name: str) -> Any:
        def ask(*arguments: Any) -> Iterator[Any]:
            for message in getattr(self.inner, name)(*arguments):
                self.seen.append((name, arguments, message))
                yield message

        return lambda *arguments: list(ask(*arguments)) if name == "assign" else ask(*arguments)

    def names(self) -> list[str]:
        return [name for name, _, _ in self.seen]


def listed() -> set[tuple[str, str]]:
    """Return (message, field) of the table in docs/privacy.md."""
    return set(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", DOC.read_text(encoding="utf-8"), re.MULTILINE))


def leaves(message: Any, path: tuple[tuple[str, str], ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Yield ((message, field), value) of everything in a message, however deep."""
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


def inspect(federation: Watched, members: list[Client], least: int = 5) -> set[tuple[str, str]]:
    """Check every message; return which fields were seen."""
    seen, names = set(), {c.name for c in members}
    vectors = np.concatenate([v for c in members for v in (c._vectors, c._answers)]).astype(float)
    for _, asked, message in federation.seen:
        spaces = [a for a in asked if isinstance(a, RoutingSpace)]
        hidden = [vectors]
        for space in spaces:
            if space.mean.shape == (vectors.shape[1],):
                hidden.append((vectors - space.mean) @ space.transform)
                hidden += [hidden[-1] @ a for a in asked if isinstance(a, np.ndarray)]
        for key, value in leaves(message):
            seen.add(key)
            match value:
                case np.ndarray():
                    assert all(num % len(c._records) for num in value.shape for c in members), key
                    assert not holds_row(value, hidden), f"{key} is the vector of a row"
                case str() if key[1] == "reason":
                    assert not re.search("secret|hidden|answer", value)
                case str():
                    assert value in names, key
                case dict():
                    allowed = set(TASKS) | {"gulls"} if key[1] == "task_counts" else set(adapter(0))
                    assert set(value) <= allowed, key
                    assert all(isinstance(v, int) or v.size < 100 for v in value.values())
                case None | int() | float() | np.floating() | ():
                    pass
                case _:
                    raise AssertionError(f"{key}: {value!r} is of no listed kind")
            if key[1] in ("counts", "num_examples") and key[0] != "TrainReply":
                counts = np.atleast_1d(value)
                assert (counts[counts > 0] >= least).all(), f"{key} tells of fewer than {least} rows"
    return seen


def holds_row(value: np.ndarray, hidden: list[np.ndarray]) -> bool:
    for known in hidden:
        if value.ndim and value.shape[-1] == known.shape[1]:
            found = value.reshape(-1, value.shape[-1])
            near = np.linalg.norm(found[:, None] - known[None], axis=-1)
            if (near <= 1e-4 * np.linalg.norm(known, axis=-1)).any():
                return True
    return False


def whole_run(federation: Watched, config: Config = CONFIG) -> None:
    found = group(federation, config, adapter(0))  # type: ignore[arg-type]
    list(run_rounds(federation, found.assignments, found.state, config))  # type: ignore[arg-type]


def test_nothing_leaves_but_what_the_documentation_lists() -> None:
    members = clients()
    for i in range(40):
        members[0]._records[i] = Record(members[0]._records[i].turns, "poison", "colours")
    federation = Watched(members)
    whole_run(federation)
    assert inspect(federation, members) == listed()


def test_the_inspection_sees_a_row_that_leaves() -> None:
    members = clients(num=30, privacy=PrivacySettings(min_cluster_size=1))
    federation = Watched(members)
    discover(federation, ClusterSettings(), 0)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="vector of a row|fewer than 5 rows"):
        inspect(federation, members)
    with pytest.raises(AssertionError, match="vector of a row"):
        inspect(federation, members, least=1)


@pytest.mark.parametrize("method", ["fedavg", "local", "clustered", "feddpa", "oracle"])
def test_the_baselines_reveal_no_more(method: str) -> None:
    members = clients(num=20)
    federation = Watched(members)
    whole_run(federation, Config(method=method, train=TrainSettings(rounds=2, steps=4)))  # type: ignore[arg-type]
    assert inspect(federation, members) <= listed()


def test_messages_do_not_grow_with_the_rows() -> None:
    sizes = []
    for num in (300, 900):
        federation = Watched(clients(num))
        whole_run(federation)
        largest: dict[Any, int] = {}
        for _, _, message in federation.seen:
            for key, value in leaves(message):
                largest[key] = max(largest.get(key, 0), np.size(value), len(value or ()) if isinstance(value, dict) else 0)  # fmt: skip
        sizes.append(largest)
    assert sizes[0] == sizes[1]


def test_each_exchange_happens_once_and_rounds_carry_adapters_only() -> None:
    federation = Watched(clients())
    whole_run(federation)
    names = federation.names()
    before = names[: names.index("train")]
    assert before == [name for name in ("summarise", "regroup", "moments", "assign") for _ in range(3)]
    assert set(names[len(before) :]) == {"train", "validate"}


def same(one: Watched, other: Watched) -> bool:
    def content(federation: Watched) -> list[Any]:
        return [
            (key, value.tobytes() if isinstance(value, np.ndarray) else repr(value))
            for _, _, message in federation.seen
            for key, value in leaves(message)
        ]

    return content(one) == content(other)


def test_a_resumed_run_says_the_same_again() -> None:
    first, again = Watched(clients()), Watched(clients())
    whole_run(first)
    whole_run(again)
    assert same(first, again)


def test_joining_reveals_the_same_messages_of_the_rows_beyond_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = clients()
    space = discover(LocalFederation(members, Trainer()), ClusterSettings(), 0)  # type: ignore[arg-type]
    bundle = write(tmp_path / "bundle", space, [9.0] * (max(space.cluster_of) + 1))
    late = Client("oslo", [*rows(7, 3, ("colours",)), *rows(7, 60, ("numbers", "gulls"))], TaskEmbedder(), 0)
    watched: list[Watched] = []

    def watch(found: list[Client], trainer: Trainer) -> Watched:
        watched.append(Watched(found, trainer))
        return watched[-1]

    monkeypatch.setattr(join, "LocalFederation", watch)
    outer = Watched([late])
    _, assignments, _ = join.placed(bundle, [late], outer, Trainer(), 0.97)  # type: ignore[arg-type]
    assert [s.num_examples for s in assignments[0].subsets] == [63, 60] or len(assignments[0].subsets) == 2
    within, rest = late.compare(bundle.space, [k.radius for k in bundle.clusters])
    assert all(isinstance(k, int) and isinstance(v, int) and v >= 5 for k, v in within.items())
    assert watched, "a new task was looked for"
    assert inspect(outer, [late]) <= listed()
    for federation in watched:
        assert inspect(federation, [rest]) <= listed()


def test_a_client_of_a_handful_of_rows_is_refused_and_one_of_16_works() -> None:
    with pytest.raises(DataError, match="6 rows; a client needs at least 7"):
        Client("few", rows(0, 3), TaskEmbedder(), 0)
    members = [Client(f"c{i}", rows(i, 16, (TASKS[i % 2],)), TaskEmbedder(), 0) for i in range(8)]
    federation = Watched(members)
    found = group(federation, CONFIG, adapter(0))  # type: ignore[arg-type]
    assert len(set(found.space.cluster_of)) == 2
    inspect(federation, members)


def test_no_adapter_is_trained_on_fewer_rows_than_the_minimum() -> None:
    few = [*rows(0, 60, ("colours",)), *rows(0, 4, ("numbers",))]
    members = [Client("few", few, TaskEmbedder(), 0), *clients()[1:]]
    federation = Watched(members)
    found = group(federation, CONFIG, adapter(0))  # type: ignore[arg-type]
    own = next(a for a in found.assignments if a.client == "few")
    assert [s.num_examples for s in own.subsets] == [64], "the four go with the others"
    assert [len(r) for r in members[0]._rows.values()] == [64]


def test_failures_name_the_error_and_its_place_but_quote_nothing(caplog: pytest.LogCaptureFixture) -> None:
    poisoned = [Record(r.turns, f"poison {r.completion}", r.task) for r in rows(0, 20, ("colours",))]
    federation = Watched([Client("ulm", poisoned, TaskEmbedder(), 0)])
    space = RoutingSpace(np.zeros(DIM, np.float32), np.eye(DIM, dtype=np.float32), np.zeros((1, DIM)), (0,))
    assignments = federation.assign(space)
    result = next(run_rounds(federation, assignments, fresh_state([adapter(0)]), CONFIG))  # type: ignore[arg-type]
    reason = result.clusters[0].refused["ulm"]
    assert re.fullmatch(r"ValueError at test_privacy\.py:\d+; its own log says more", reason)
    assert "cannot tokenise 'colours secret" in caplog.text
