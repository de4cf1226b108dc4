"""One cell: train, choose the adapter for each test prompt, generate answers, score → one line of results.

Every test prompt is evaluated for every client. An *evaluation* is a pair:

- routing ``global``: the adapter of the nearest task cluster answers; ``local``: of the nearest task cluster
  with rows of the client, which with method ``local`` is the client's adapter.
- tests ``own``: a client is evaluated on its own tasks; ``all``: on every task.

A prompt's score is the mean over clients, a task's over its prompts, a cell's over tasks. The nearest adapter
also answers beyond the radius, so that no method benefits from the base.
"""

import importlib.metadata
import json
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fedrouter import __version__
from fedrouter.bundle import CONFIG, WEIGHTS, Bundle, find_base, find_embedder
from fedrouter.config import Config
from fedrouter.embed import Embedder, routing_text
from fedrouter.evaluate import TaggedRecord
from fedrouter.evaluate.endpoint import Answer
from fedrouter.evaluate.scores import Result, score
from fedrouter.experiment.compose import Mix, mix_of, name_of, write_mixes
from fedrouter.experiment.engine import Engine, Transformers
from fedrouter.experiment.grid import Cell, config_of, has_curve, is_shown, questions_of, unseen_of
from fedrouter.experiment.results import BEYOND, METRICS, Line
from fedrouter.experiment.settings import Settings, World
from fedrouter.inspect import read_metrics
from fedrouter.route import BASE_NAME, Router
from fedrouter.train.client.sources import load_clients
from fedrouter.train.run import train
from fedrouter.types import Decision

ROUTINGS, TESTS = ("global", "local"), ("own", "all")
PLACES = 4  # decimal places of stored scores


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained cell."""

    cell: Cell
    config: Config
    bundle: Bundle
    directory: Path
    seconds: float

    @property
    def adapters(self) -> dict[str, Path]:
        """The adapters' directories by name."""
        return self.bundle.adapter_paths


def train_cell(settings: Settings, cell: Cell, out: Path) -> Trained:
    """Train a cell in a directory below ``out``, or resume its training there."""
    directory = out / cell.key
    directory.mkdir(parents=True, exist_ok=True)
    num_tasks = len({record.task for record in questions_of(settings.worlds[cell.world])})
    config = config_of(settings, cell, num_tasks)
    began = time.perf_counter()
    with (directory / "train.log").open("a", encoding="utf-8") as log:
        bundle = train(config, directory / "run", Console(file=log, width=110, markup=False))
    return Trained(cell, config, bundle, directory, time.perf_counter() - began)


def searched(trained: Trained) -> Line:
    """Return the line of a learning rate search's cell: the mean validation loss."""
    best: dict[str, float] = {}
    for line in _metrics(trained):
        if line.get("validation") is not None:
            best[line["cluster"]] = min(best.get(line["cluster"], np.inf), line["validation"])
    return {
        **_facts(trained),
        "loss": round(float(np.mean(list(best.values()))), 5) if best else None,
        "rounds": _rounds(trained),
    }


def tested(settings: Settings, trained: Trained, engine: Engine) -> Line:
    """Generate and score the answers of a cell's adapters; return the cell's line."""
    world = settings.worlds[trained.cell.world]
    tests, bundle = questions_of(world), trained.bundle
    embedder = embedder_of(bundle, engine)
    clients = load_clients(trained.config, lambda _: None)
    client_tasks = {client: {record.task for record in records} for client, records in clients.items()}
    vectors = embedder.embed([routing_text(test.record.turns) for test in tests])
    global_decisions = Router(bundle, "nearest").route(vectors)
    decisions = {
        "global": dict.fromkeys(client_tasks, global_decisions),
        "local": {client: Router(bundle, "nearest", client).route(vectors) for client in client_tasks},
    }
    requests = sorted(
        {
            (decision.model, i)
            for by_client in decisions.values()
            for of_client in by_client.values()
            for i, decision in enumerate(of_client)
        }
    )
    began = time.perf_counter()
    results = answered(engine, trained.adapters, tests, requests, world.max_tokens)
    seconds = time.perf_counter() - began
    (trained.directory / "answers.jsonl").write_text(
        "".join(
            json.dumps({"adapter": name, "prompt": i, "answer": results[name, i].answer.text}) + "\n"
            for name, i in requests
        ),
        encoding="utf-8",
    )
    line = {
        **_facts(trained),
        "engine": engine.name,
        "answer_seconds": round(seconds, 1),
        "num_tests": len(tests),
        "scores": evaluations(tests, client_tasks, decisions, results, world),
        "routing": _routing(bundle, tests, global_decisions),
        "rounds": _rounds(trained),
        "traffic": _traffic(trained),
    }
    if has_curve(settings, trained.cell):
        line["curve"] = curve(trained, tests, [d.model for d in global_decisions], engine, world)
    if trained.config.method == "fedrouter":
        if world.unseen:
            line["unseen"] = beyond(trained, embedder, engine, world)
        if is_shown(settings, trained.cell):
            line["map"] = _map(trained)
    return line


def embedder_of(bundle: Bundle, engine: Engine | None = None) -> Embedder:
    """Return a bundle's embedder; reuses the engine's base model if possible."""
    shared = engine.embedder(bundle) if isinstance(engine, Transformers) else None
    return shared or find_embedder(bundle, find_base(bundle))


def answered(
    engine: Engine,
    adapters: Mapping[str, Path],
    tests: Sequence[TaggedRecord],
    requests: Sequence[tuple[str, int]],
    max_tokens: int,
) -> dict[tuple[str, int], Result]:
    """Generate and score the answer to each request: an adapter's name and the number of a test."""
    if not requests:
        return {}
    texts = engine.answers(adapters, [(name, tests[i].record.turns) for name, i in requests], max_tokens)
    return {
        (name, i): score(tests[i], Answer(text, name))
        for (name, i), text in zip(requests, texts, strict=True)
    }


def evaluations(
    tests: Sequence[TaggedRecord],
    client_tasks: Mapping[str, set[str | None]],
    decisions: Mapping[str, Mapping[str, Sequence[Decision]]],
    results: Mapping[tuple[str, int], Result],
    world: World,
) -> Line:
    """Return the scores of each evaluation: by task and metric; by prompt in the world's metric.

    Parameters
    ----------
    client_tasks : the tasks of each client's rows.
    decisions : by routing and client, one per test.
    results : by adapter and number of the test.
    """
    found: Line = {}
    for routing in ROUTINGS:
        for kind in TESTS:
            if (routing, kind) == ("global", "own"):
                continue  # the same as "all", because all clients have equally many tasks
            by_prompt: dict[str, list[float]] = {metric: [] for metric in METRICS}
            for i, test in enumerate(tests):
                clients = [c for c in client_tasks if kind == "all" or test.record.task in client_tasks[c]]
                answers = [results[decisions[routing][client][i].model, i] for client in clients]
                for metric in METRICS:
                    by_prompt[metric].append(float(np.mean([getattr(result, metric) for result in answers])))
            tasks: dict[str, list[int]] = defaultdict(list)
            for i, test in enumerate(tests):
                tasks[test.task].append(i)
            found[f"{routing}/{kind}"] = {
                "tasks": {
                    task: {
                        metric: round(float(np.mean([by_prompt[metric][i] for i in rows])), PLACES)
                        for metric in METRICS
                    }
                    for task, rows in tasks.items()
                },
                "prompts": {
                    task: [round(by_prompt[world.metric][i], 3) for i in rows] for task, rows in tasks.items()
                },
            }
    found["global/own"] = {"same as": "global/all"}
    return found


def merged(trained: Trained, world: World, embedder: Embedder) -> tuple[list[Decision], dict[str, Mix]]:
    """Return the decisions for prompts of untrained tasks, and the merged adapters that could answer them."""
    vectors = embedder.embed([routing_text(test.record.turns) for test in unseen_of(world)])
    decisions = Router(trained.bundle, "nearest").route(vectors)
    mixes = [mix_of(trained.bundle, decision) for decision in decisions if decision.fallback]
    return decisions, {name_of(mix): mix for mix in mixes}


def beyond(trained: Trained, embedder: Embedder, engine: Engine, world: World) -> Line:
    """Return the scores for prompts of untrained tasks, by the policy for prompts beyond the radius."""
    bundle, tests = trained.bundle, unseen_of(world)
    decisions, mixes = merged(trained, world, embedder)
    adapters: dict[str, list[str]] = {}  # policy → the adapter that answers each prompt
    for kind in BEYOND:
        adapters[kind] = [
            d.model
            if not d.fallback or kind == "nearest"
            else {"base": BASE_NAME, "generalist": bundle.generalist or BASE_NAME}.get(kind)
            or name_of(mix_of(bundle, d))
            for d in decisions
        ]
    requests = sorted({(name, i) for names in adapters.values() for i, name in enumerate(names)})
    unmixed = [(name, i) for name, i in requests if name not in mixes]
    results = answered(engine, trained.adapters, tests, unmixed, world.max_tokens)
    if mixes:
        paths = write_mixes(bundle, mixes, trained.directory / "mixes")
        mixed = [(name, i) for name, i in requests if name in mixes]
        results |= answered(engine, paths, tests, mixed, world.max_tokens)
    found: Line = {}
    for task in sorted({test.task for test in tests}):
        rows = [i for i, test in enumerate(tests) if test.task == task]
        found[task] = {"beyond": round(float(np.mean([decisions[i].fallback for i in rows])), PLACES)}
        for kind, names in adapters.items():
            answers = [results[names[i], i] for i in rows]
            found[task][kind] = {
                metric: round(float(np.mean([getattr(result, metric) for result in answers])), PLACES)
                for metric in METRICS
            }
    return found


def curve(
    trained: Trained, tests: Sequence[TaggedRecord], names: Sequence[str], engine: Engine, world: World
) -> list[float]:
    """Return the score after each round, with the adapters in checkpoints and the final routing."""
    bundle, found = trained.bundle, []
    for checkpoint in sorted((trained.directory / "run" / "checkpoints").glob("round-*")):
        paths = {}
        for k, cluster in enumerate(bundle.clusters):
            paths[cluster.adapter] = trained.directory / "curve" / checkpoint.name / cluster.adapter
            paths[cluster.adapter].mkdir(parents=True, exist_ok=True)
            shutil.copy(bundle.adapter_path(cluster) / CONFIG, paths[cluster.adapter])
            shutil.copy(checkpoint / f"cluster-{k}.safetensors", paths[cluster.adapter] / WEIGHTS)
        requests = [(name, i) for i, name in enumerate(names)]
        results = answered(engine, paths, tests, requests, world.max_tokens)
        tasks: dict[str, list[float]] = defaultdict(list)
        for name, i in requests:
            tasks[tests[i].task].append(getattr(results[name, i], world.metric))
        found.append(round(float(np.mean([np.mean(scores) for scores in tasks.values()])), PLACES))
    return found


def _facts(trained: Trained) -> Line:
    cell, config = trained.cell, trained.config
    return {
        "key": cell.key,
        "world": cell.world,
        "scenario": cell.scenario,
        "method": cell.method,
        "seed": cell.seed,
        "learning_rate": config.train.learning_rate,
        "adapters": len(trained.bundle.clusters),
        "train_seconds": round(trained.seconds, 1),
        "versions": {
            "fedrouter": __version__,
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        },
    }


def _metrics(trained: Trained) -> list[Line]:
    return [line for line in read_metrics(trained.directory / "run") if "cluster" in line]


def _rounds(trained: Trained) -> list[Line]:
    """Return each round's training loss and, if there is one, validation loss: means over examples."""
    rounds: dict[int, list[Line]] = defaultdict(list)
    for line in _metrics(trained):
        rounds[line["round"]].append(line)
    found = []
    for number in sorted(rounds):
        lines = [line for line in rounds[number] if line["loss"] is not None]
        weights = [line["num_examples"] for line in lines]
        means: Line = {"round": number}
        for key in ("loss", "validation"):
            values = [line[key] for line in lines if line.get(key) is not None]
            if values and len(values) == len(lines):
                means[key] = round(float(np.average(values, weights=weights)), 5)
        found.append(means)
    return found


def _traffic(trained: Trained) -> Line:
    """Return the size of an adapter, and the bytes that all clients send and receive in a round."""
    size = sum(4 * int(np.prod(shape)) for shape in trained.bundle.shapes.values())
    if trained.config.method == "feddpa":  # the bundle's merged adapters have twice the rank
        size //= 2
    by_round = Counter[int]()
    for line in _metrics(trained):
        by_round[line["round"]] += line["num_clients"]
    if trained.config.method == "local":
        by_round.clear()  # nothing leaves a client
    num_updates = float(np.mean(list(by_round.values()))) if by_round else 0.0
    return {"adapter_bytes": size, "bytes_per_round": round(2 * num_updates * size)}  # to clients and back


def _routing(bundle: Bundle, tests: Sequence[TaggedRecord], decisions: Sequence[Decision]) -> Line:
    task_of = {c.name: c.task for c in bundle.clusters}
    right = [task_of[d.cluster] == test.task for d, test in zip(decisions, tests, strict=True)]
    rejected = [d.fallback for d in decisions]
    return {
        "accuracy": round(float(np.mean(right)), PLACES),
        "beyond": round(float(np.mean(rejected)), PLACES),
    }


def _map(trained: Trained) -> list[list[Any]]:
    """Return the clients' rows on a map (t-SNE): x, y, task, client."""
    tsne = json.loads((trained.directory / "run" / "tsne.json").read_text(encoding="utf-8"))
    return [
        [round(x, 1), round(y, 1), task, client]
        for (x, y), task, client in zip(tsne["points"], tsne["tasks"], tsne["clients"], strict=True)
    ]
