"""Records × models → report."""

import asyncio
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.console import Console

from fedrouter import __version__
from fedrouter.data import IN_COMMAND, builtin_records, load_records
from fedrouter.errors import ConfigError, DataError, ServingError
from fedrouter.evaluate.endpoint import GIVE_UP_AFTER, Answer, Endpoint
from fedrouter.evaluate.progress import progress
from fedrouter.evaluate.report import ModelReport, Report
from fedrouter.evaluate.scores import (
    TaggedRecord,
    by_adapter,
    by_client,
    by_task,
    mean_over_groups,
    mean_scores,
    routing,
    score,
    scores_by,
)
from fedrouter.layout import print_line

ORACLE = "oracle"  # pseudo model name for the adapter of the record's task


def load(
    sources: Sequence[str],
    *,
    num_per_task: int = 100,
    seed: int = 0,
    fields: Mapping[str, str] | None = None,
) -> list[TaggedRecord]:
    """Read test records from files, data sets (their ``test`` split) or ``builtin:`` names.

    The client of a record is its file's name without suffix, or the whole source if two files have the same
    name. ``num_per_task`` and ``seed`` are for built-in data, ``fields`` is the mapping of ``[data.fields]``.

    Raises
    ------
    DataError, ConfigError
        As in ``fedrouter.data``.
    """
    stems = [Path(source).stem for source in sources]
    clients = stems if len(set(stems)) == len(stems) else sources
    tagged = []
    for source, client in zip(sources, clients, strict=True):
        if source.startswith("builtin:"):
            records = builtin_records(source, "test", num_per_task, seed)
        else:
            records = load_records(source, fields=fields, default="test", options=IN_COMMAND)
        tagged += [TaggedRecord(record, client) for record in records]
    return tagged


def first_of_each_task(records: Sequence[TaggedRecord], num: int) -> list[TaggedRecord]:
    """Return at most ``num`` records of each task, in their order."""
    left: dict[str | None, int] = defaultdict(lambda: num)
    kept = []
    for tagged in records:
        left[tagged.record.task] -= 1
        if left[tagged.record.task] >= 0:
            kept.append(tagged)
    return kept


def evaluate(
    url: str,
    records: Sequence[TaggedRecord],
    models: Sequence[str] = ("fedrouter",),
    *,
    api_key: str | None = None,
    concurrency: int = 16,
    max_tokens: int = 64,
    temperature: float = 0.0,
    timeout_s: float = 120.0,
    retries: int = 3,
    limit_per_task: int | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> Report:
    """Send every record to every model, one model after the other, and score the answers.

    Parameters
    ----------
    url : str
        The endpoint, with or without ``/v1``.
    records : sequence of TaggedRecord
        The test records.
    models : sequence of str
        Names that the endpoint lists, or ``oracle`` for the adapter of each record's task, which needs
        ``fedrouter serve`` at ``url`` and a bundle trained with task labels.
    api_key : str or None
        Sent as a bearer token.
    concurrency : int
        Maximum number of concurrent requests.
    max_tokens : int
        Maximum number of tokens per answer.
    temperature : float
        Sampling temperature; 0 for greedy decoding.
    timeout_s : float
        Timeout of one attempt.
    retries : int
        Further attempts after 429, 5xx and connection errors.
    limit_per_task : int or None
        Maximum number of records per task, drawn at random.
    seed : int
        Seed of that draw.
    console : rich.console.Console or None
        Console for progress; None for no output.

    Raises
    ------
    ServingError
        If the endpoint cannot be reached, refuses the key, lacks a model, or is lost during the run. A single
        failed record is no error: it scores 0 and counts in ``Report.num_failed``.
    DataError
        If there are no records, or with ``oracle`` a record's task has no adapter.
    ConfigError
        If a setting is out of range.
    """
    models = list(dict.fromkeys(models))
    if not models or concurrency < 1 or max_tokens < 1 or retries < 0 or timeout_s <= 0:
        raise ConfigError(
            "evaluation needs a model, concurrency ≥ 1, max_tokens ≥ 1, retries ≥ 0 and a timeout > 0"
        )
    if limit_per_task is not None and records:
        records = _draw(records, limit_per_task, seed)
    if not records:
        raise DataError("no records to evaluate; give at least one data file with records")
    settings = {
        "num_records": len(records),
        "concurrency": concurrency,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "limit_per_task": limit_per_task,
        "seed": seed,
    }

    async def run() -> Report:
        async with Endpoint(url, api_key=api_key, timeout_s=timeout_s, retries=retries) as endpoint:
            task_adapters = await _check(endpoint, records, models)
            reports = []
            for model in models:
                names = [task_adapters[example.task] if model == ORACLE else model for example in records]
                started_s = time.perf_counter()
                with progress(console, model, len(records)) as advance:
                    answers = await _ask_all(
                        endpoint, names, records, concurrency, max_tokens, temperature, advance
                    )
                seconds = time.perf_counter() - started_s
                reports.append(_summarise(model, records, answers, task_adapters, seconds))
                if console is not None:
                    print_line(console, _line(reports[-1]))
            return Report(endpoint.url, settings, _versions(), tuple(reports))

    return asyncio.run(run())


async def _check(
    endpoint: Endpoint, records: Sequence[TaggedRecord], models: Sequence[str]
) -> Mapping[str, str]:
    """Check everything that would fail later; return the adapter of each task."""
    await endpoint.check([model for model in models if model != ORACLE])
    task_adapters = await endpoint.task_adapters()
    if ORACLE not in models:
        return task_adapters or {}
    if task_adapters is None:
        raise ServingError(
            f"{endpoint.url} does not list its task clusters, which model {ORACLE!r} needs; "
            "use a server started with fedrouter serve"
        )
    for number, example in enumerate(records, start=1):
        if example.task not in task_adapters:
            known = ", ".join(sorted(task_adapters)) or "none"
            raise DataError(
                f"record {number} (client {example.client}) has task {example.record.task!r}, for which no "
                f"adapter was trained (trained: {known}); correct it or leave out model {ORACLE!r}"
            )
    await endpoint.check(sorted({task_adapters[example.task] for example in records}))
    return task_adapters


async def _ask_all(
    endpoint: Endpoint,
    names: Sequence[str],
    records: Sequence[TaggedRecord],
    concurrency: int,
    max_tokens: int,
    temperature: float,
    advance: Callable[[], None],
) -> list[Answer]:
    """Send ``records[i]`` to ``names[i]``, at most ``concurrency`` at a time."""
    answers: dict[int, Answer] = {}
    waiting = iter(range(len(records)))  # shared by the workers, so each record is taken once

    async def work() -> None:
        for index in waiting:
            if endpoint.num_lost >= GIVE_UP_AFTER:
                return
            answers[index] = await endpoint.ask(
                names[index], records[index].record.turns, max_tokens=max_tokens, temperature=temperature
            )
            advance()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(records))):
            group.create_task(work())
    if len(answers) < len(records):
        answered = sum(answer.error is None for answer in answers.values())
        raise ServingError(
            f"lost the connection to {endpoint.url} after {answered} of {len(records)} records; "
            "check the server's log, restart it and repeat the evaluation"
        )
    return [answers[index] for index in range(len(records))]


def _summarise(
    model: str,
    records: Sequence[TaggedRecord],
    answers: Sequence[Answer],
    task_adapters: Mapping[str, str],
    seconds: float,
) -> ModelReport:
    results = [score(example, answer) for example, answer in zip(records, answers, strict=True)]
    tasks = scores_by(results, by_task)
    latencies_s = [answer.latency_s for answer in answers if answer.latency_s is not None]
    p50, p95 = np.percentile(latencies_s, [50, 95]).tolist() if latencies_s else (None, None)
    num_tokens = [answer.num_tokens for answer in answers if answer.num_tokens is not None]
    return ModelReport(
        model=model,
        mean=mean_over_groups(tasks),
        overall=mean_scores(results),
        by_task=tasks,
        by_client=scores_by(results, by_client),
        by_adapter=scores_by(results, by_adapter),
        routing=routing(results, task_adapters),
        latency_p50_s=p50,
        latency_p95_s=p95,
        tokens_per_s=sum(num_tokens) / seconds if num_tokens else None,
        seconds=seconds,
        results=tuple(results),
    )


def _draw(records: Sequence[TaggedRecord], limit_per_task: int, seed: int) -> list[TaggedRecord]:
    """Draw at most ``limit_per_task`` records of each task, in their original order."""
    if limit_per_task < 1:
        raise ConfigError(f"limit_per_task is {limit_per_task}; it must be at least 1")
    indices: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(records):
        indices[example.task].append(index)
    draw = np.random.default_rng(seed)
    chosen = [draw.permutation(indices[task])[:limit_per_task] for task in sorted(indices)]
    return [records[index] for index in sorted(np.concatenate(chosen).tolist())]


def _line(report: ModelReport) -> str:
    return (
        f"{report.model}: {report.overall.num_examples} records in {report.seconds:.1f} s, "
        f"mean ROUGE-1 {report.mean.rouge_1:.3f}, {report.overall.num_failed} failed"
    )


def _versions() -> dict[str, str]:
    packages = ("openai", "rouge_score")
    return {
        "fedrouter": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }
