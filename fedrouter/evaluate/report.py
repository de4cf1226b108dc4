"""Results of an evaluation: as tables, as JSON, as one JSON line per answer."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedrouter.evaluate.scores import Result, Routing, Scores
from fedrouter.files import write_atomically, writing
from fedrouter.layout import Whole

SCHEMA_VERSION = 1
NUM_FAILURES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class ModelReport:
    """The results of one model; ``mean`` gives every task the same weight, ``overall`` every record."""

    model: str  # the requested name
    mean: Scores
    overall: Scores
    by_task: Mapping[str, Scores]
    by_client: Mapping[str, Scores]
    by_adapter: Mapping[str, Scores]  # by the adapter that answered
    routing: Routing | None  # None if the endpoint did not choose adapters
    latency_p50_s: float | None
    latency_p95_s: float | None
    tokens_per_s: float | None  # generated tokens of all requests
    seconds: float
    results: tuple[Result, ...]  # in the order of the records


@dataclass(frozen=True, slots=True)
class Report:
    """The whole evaluation."""

    url: str  # without credentials
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    models: tuple[ModelReport, ...]

    @property
    def num_failed(self) -> int:
        """Records that got no answer after all retries, over all models."""
        return sum(report.overall.num_failed for report in self.models)

    @property
    def ratios(self) -> dict[str, float]:
        """Mean ROUGE-1 of ``fedrouter`` (else of the first model) ÷ that of each other model."""
        first = next((report for report in self.models if report.model == "fedrouter"), self.models[0])
        return {
            f"{first.model} ÷ {other.model}": first.mean.rouge_1 / other.mean.rouge_1
            for other in self.models
            if other is not first and other.mean.rouge_1 > 0
        }


def render(report: Report) -> RenderableType:
    """Format the report for a terminal: scores, ratios, scores by client, routing, failures."""
    parts: list[RenderableType] = [Whole(_score_table(report))]
    parts += [Text(f"mean ROUGE-1, {names} = {ratio:.3f}") for names, ratio in report.ratios.items()]
    if len({client for model in report.models for client in model.by_client}) > 1:
        parts.append(Whole(_client_table(report)))
    for model in report.models:
        if model.routing:
            parts += [Whole(_routing_table(model, model.routing)), _routing_line(model, model.routing)]
    failures = list(_failures(report))
    parts += [
        Text(f"failed: {failure['model']}, record {failure['record']}: {failure['error']}")
        for failure in failures[:NUM_FAILURES_SHOWN]
    ]
    if len(failures) > NUM_FAILURES_SHOWN:
        parts.append(Text(f"… and {len(failures) - NUM_FAILURES_SHOWN} more failed"))
    return Group(*parts)


def to_json(report: Report) -> str:
    """Return everything but the individual answers, as JSON."""
    models = {model.model: _aggregates(model) for model in report.models}
    content = {
        "schema_version": SCHEMA_VERSION,
        "url": report.url,
        "settings": dict(report.settings),
        "versions": dict(report.versions),
        "models": models,
        "ratios": report.ratios,
        "num_failed": report.num_failed,
        "failures": list(_failures(report)),
    }
    return json.dumps(content, ensure_ascii=False, indent=2)


def write_json(report: Report, path: Path) -> None:
    """Write everything but the individual answers as JSON, atomically."""
    write_lines(path, [to_json(report)])


def write_records(report: Report, path: Path) -> None:
    """Write one JSON line per model and record: prompt, expected, output, route and scores, atomically."""
    write_lines(path, (json.dumps(line, ensure_ascii=False) for line in _record_lines(report)))


def _score_table(report: Report) -> Table:
    table = Table("task", "records", title="ROUGE-1 by task")
    for model in report.models:
        table.add_column(model.model, justify="right")
    first = report.models[0]
    for task, scores in first.by_task.items():
        cells = [f"{model.by_task[task].rouge_1:.3f}" for model in report.models]
        table.add_row(task, str(scores.num_examples), *cells)
    table.add_section()
    num_examples = str(first.overall.num_examples)
    rows: list[tuple[str, list[str]]] = [
        ("mean ROUGE-1", [f"{model.mean.rouge_1:.3f}" for model in report.models]),
        ("mean ROUGE-L", [f"{model.mean.rouge_l:.3f}" for model in report.models]),
        ("mean exact match", [f"{model.mean.exact_match:.3f}" for model in report.models]),
    ]
    for name, cells in rows:
        table.add_row(name, num_examples, *cells)
    table.add_section()
    table.add_row("latency p50, ms", "", *(_number(model.latency_p50_s, 1000) for model in report.models))
    table.add_row("latency p95, ms", "", *(_number(model.latency_p95_s, 1000) for model in report.models))
    table.add_row("tokens/s", "", *(_number(model.tokens_per_s) for model in report.models))
    if report.num_failed:
        table.add_row("failed", "", *(str(model.overall.num_failed) for model in report.models))
    return table


def _client_table(report: Report) -> Table:
    table = Table("client", "records", title="ROUGE-1 by client")
    for model in report.models:
        table.add_column(model.model, justify="right")
    for client, scores in report.models[0].by_client.items():
        cells = [f"{model.by_client[client].rouge_1:.3f}" for model in report.models]
        table.add_row(client, str(scores.num_examples), *cells)
    return table


def _routing_table(model: ModelReport, routing: Routing) -> Table:
    adapters = sorted({adapter for row in routing.confusion.values() for adapter in row})
    table = Table("task", title="prompts by adapter")
    for adapter in adapters:
        table.add_column(adapter, justify="right")
    for task, row in routing.confusion.items():
        table.add_row(task, *(str(row.get(adapter, 0)) for adapter in adapters))
    table.add_section()
    table.add_row("ROUGE-1", *(f"{model.by_adapter[adapter].rouge_1:.3f}" for adapter in adapters))
    return table


def _routing_line(model: ModelReport, routing: Routing) -> Text:
    right = "" if routing.accuracy is None else f"{routing.accuracy:.1%} to the task's adapter, "
    return Text(f"{model.model} sent {right}{routing.fallback_rate:.1%} to the fallback")


def _aggregates(model: ModelReport) -> dict[str, Any]:
    return {
        "mean": asdict(model.mean),
        "overall": asdict(model.overall),
        "by_task": {name: asdict(scores) for name, scores in model.by_task.items()},
        "by_client": {name: asdict(scores) for name, scores in model.by_client.items()},
        "by_adapter": {name: asdict(scores) for name, scores in model.by_adapter.items()},
        "routing": asdict(model.routing) if model.routing else None,
        "latency_p50_s": model.latency_p50_s,
        "latency_p95_s": model.latency_p95_s,
        "tokens_per_s": model.tokens_per_s,
        "seconds": model.seconds,
    }


def _failures(report: Report) -> Iterator[dict[str, Any]]:
    for model in report.models:
        for number, result in enumerate(model.results, start=1):
            if result.answer.error is not None:
                yield {
                    "model": model.model,
                    "record": number,  # from 1, in the order of the records
                    "client": result.example.client,
                    "task": result.example.record.task,
                    "error": result.answer.error,
                }


def _record_lines(report: Report) -> Iterator[dict[str, Any]]:
    for model in report.models:
        for number, result in enumerate(model.results, start=1):
            record, answer = result.example.record, result.answer
            yield {
                "model": model.model,
                "record": number,
                "client": result.example.client,
                "task": record.task,
                "prompt": [{"role": turn.role, "content": turn.content} for turn in record.turns],
                "expected": record.completion,
                "output": answer.text,
                "adapter": answer.adapter,
                "cluster": answer.cluster,
                "distance": _finite(answer.distance),
                "fallback": answer.fallback,
                "latency_s": answer.latency_s,
                "num_tokens": answer.num_tokens,
                "rouge_1": result.rouge_1,
                "rouge_l": result.rouge_l,
                "exact_match": result.exact_match,
                "error": answer.error,
            }


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isinf(value) else value  # JSON has no infinity


def _number(value: float | None, scale: float = 1.0) -> str:
    return "–" if value is None else f"{value * scale:.0f}"


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines atomically.

    Raises
    ------
    ConfigError
        If the file cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(f"{line}\n" for line in lines))
