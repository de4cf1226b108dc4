"""Results as tables: Markdown for readers, LaTeX for papers, CSV for programs."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedrouter.experiment.compare import (
    ONE_ADAPTER,
    OURS,
    Asked,
    Gain,
    Results,
    baselines,
    best,
    evaluation,
    gain,
    native,
    task_means,
)
from fedrouter.experiment.results import BEYOND, METRICS, Line
from fedrouter.experiment.settings import Settings


@dataclass(frozen=True, slots=True)
class Table:
    """A table of strings."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def latex(self) -> str:
        """Return the table as LaTeX, for the package booktabs."""
        lines = [
            rf"% {self.title}",
            rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}",
            r"\toprule",
            _latex_row(self.columns),
            r"\midrule",
            *map(_latex_row, self.rows),
            r"\bottomrule",
            r"\end{tabular}",
        ]
        return "\n".join(lines)


def tables(settings: Settings, results: Results, searched: Sequence[Line]) -> Iterator[Table]:
    """Yield all tables that there are results for."""
    worlds = [w for w in settings.worlds if any(line["world"] == w for line in results.lines)]
    for world in worlds:
        label = settings.worlds[world].label or world
        for scenario in settings.worlds[world].scenarios or settings.scenarios:
            found = scores(settings, results, world, scenario)
            if found.rows:
                yield found
        more = [
            *(
                by_task(settings, results, world, scenario, kind)
                for scenario, kind in (("dual", "own"), ("all", "own"), ("single", "all"))
            ),
            routing(settings, results, world),
            beyond(settings, results, world),
            convergence(settings, results, world),
            searches(searched, world, label),
            traffic(settings, results, world),
        ]
        yield from (table for table in more if table is not None)


def scores(settings: Settings, results: Results, world: str, scenario: str) -> Table:
    """Return a scenario's scores, mean ± standard deviation over seeds, and FedRouter's gains."""
    shown = settings.worlds[world]
    rows = []
    for method in shown.methods or settings.methods:
        kind = settings.methods[method].get("method", method)
        first = native(method, "own", settings)
        routings = [first.routing]
        if kind not in ONE_ADAPTER:
            routings.append("local" if first.routing == "global" else "global")
        for routing_ in routings:
            cells, gains = [], []
            for tests in ("own", "all"):
                asked = Asked(method, routing_, tests)
                found = results.scores(world, scenario, asked)
                if found is None:
                    break
                cells.append(spread(found.mean, found.spread))
                ours = native(OURS, tests, settings)
                over = None if asked == ours else gain(results, world, scenario, ours, asked)
                gains.append(gain_text(over))
            if len(cells) == 2:
                num = len(results.of(world, scenario, method))
                rows.append([name_of(method, routing_, first.routing), str(num), *cells, *gains])
    return Table(
        f"{shown.label or world}, scenario {scenario}: {METRICS[shown.metric]}",
        ["method", "seeds", "own tests", "all tests", "FedRouter's gain, own", "FedRouter's gain, all"],
        rows,
    )


def summary(settings: Settings, results: Results, world: str) -> Table:
    """Return one row per method: clients' own tasks in dual and all, all tasks in single."""
    columns = [("dual", "own"), ("all", "own"), ("single", "all")]
    rows = []
    for method in settings.worlds[world].methods or settings.methods:
        found = [results.scores(world, s, native(method, tests, settings)) for s, tests in columns]
        if any(found):
            rows.append([f"`{method}`", *(spread(f.mean, f.spread) if f else "–" for f in found)])
    shown = settings.worlds[world]
    names = [f"{scenario}, {tests} tasks" for scenario, tests in columns]
    return Table(f"{shown.label or world}: {METRICS[shown.metric]}", ["method", *names], rows)


def by_task(settings: Settings, results: Results, world: str, scenario: str, tests: str) -> Table | None:
    """Return the methods' scores by task (the paper's Figure 3)."""
    shown = settings.worlds[world]
    rows, tasks = [], []
    for method in shown.methods or settings.methods:
        found = task_means(results, world, scenario, native(method, tests, settings), shown.metric)
        if found:
            tasks = list(found)
            rows.append([method, *(f"{found[task]:.3f}" for task in tasks)])
    title = f"{shown.label or world}, scenario {scenario}, tests {tests}: {METRICS[shown.metric]} by task"
    return Table(title, ["method", *tasks], rows) if rows else None


def routing(settings: Settings, results: Results, world: str) -> Table | None:
    """Return FedRouter's number of adapters, routing accuracy, and share of the oracle's score."""
    rows = []
    for scenario in settings.worlds[world].scenarios or settings.scenarios:
        for method in settings.worlds[world].methods or settings.methods:
            lines = results.of(world, scenario, method)
            if settings.methods[method].get("method", method) != OURS or not lines:
                continue
            ours = results.scores(world, scenario, Asked(method, "global", "all"))
            oracle = results.scores(world, scenario, Asked("oracle", "global", "all"))
            share = f"{ours.mean / oracle.mean:.3f}" if ours and oracle and oracle.mean else "–"
            right = [line["routing"]["accuracy"] for line in lines]
            rejected = [line["routing"]["beyond"] for line in lines]
            counts = " ".join(str(line["adapters"]) for line in lines)
            rows.append(
                [
                    scenario,
                    method,
                    counts,
                    f"{np.mean(right):.4f}",
                    f"{min(right):.4f}",
                    f"{np.mean(rejected):.3f}",
                    share,
                ]
            )
    label = settings.worlds[world].label or world
    columns = [
        "scenario",
        "method",
        "adapters by seed",
        "to the right task",
        "worst seed",
        "beyond the radius",
    ]
    return Table(f"{label}: routing", [*columns, "score ÷ oracle's"], rows) if rows else None


def beyond(settings: Settings, results: Results, world: str) -> Table | None:
    """Return the scores for prompts of untrained tasks by the policy for prompts beyond the radius."""
    rows = []
    metric = settings.worlds[world].metric
    for scenario in settings.worlds[world].scenarios or settings.scenarios:
        lines = [line for line in results.of(world, scenario, OURS) if "unseen" in line]
        for task in lines[0]["unseen"] if lines else ():
            by_seed = [line["unseen"][task] for line in lines]
            means = [
                spread(float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else float("nan"))
                for v in ([seed[policy][metric] for seed in by_seed] for policy in BEYOND)
            ]
            rows.append([scenario, task, f"{np.mean([seed['beyond'] for seed in by_seed]):.2f}", *means])
    label = settings.worlds[world].label or world
    title = f"{label}: prompts of untrained tasks, by the policy beyond the radius"
    return Table(title, ["scenario", "task", "share beyond", *BEYOND], rows) if rows else None


def convergence(settings: Settings, results: Results, world: str) -> Table | None:
    """Return the round in which a method's validation loss was lowest; the last one means too few rounds."""
    scenarios = settings.worlds[world].scenarios or settings.scenarios
    rows, last = [], 0
    for method in settings.worlds[world].methods or settings.methods:
        cells = []
        for scenario in scenarios:
            by_seed = [
                [round_["validation"] for round_ in line["rounds"]]
                for line in results.of(world, scenario, method)
                if line["rounds"] and all("validation" in round_ for round_ in line["rounds"])
            ]
            last = max([last, *map(len, by_seed)])
            cells.append(f"{np.mean([np.argmin(losses) + 1 for losses in by_seed]):.1f}" if by_seed else "–")
        if any(cell != "–" for cell in cells):
            rows.append([method, *cells])
    label = settings.worlds[world].label or world
    title = f"{label}: the round of {last} with the lowest validation loss, mean over seeds"
    return Table(title, ["method", *scenarios], rows) if rows else None


def searches(searched: Iterable[Line], world: str, label: str) -> Table | None:
    """Return each method's validation loss by learning rate; the lowest is in bold and was used."""
    found: dict[str, dict[float, float]] = {}
    for line in searched:
        if line["world"] == world and line.get("loss") is not None:
            found.setdefault(line["method"], {})[line["learning_rate"]] = line["loss"]
    rates = sorted({rate for losses in found.values() for rate in losses})
    rows = []
    for method, losses in found.items():
        lowest = min(losses, key=lambda rate: losses[rate])
        texts = [f"{losses[r]:.3f}" if r in losses else "–" for r in rates]
        rows.append(
            [
                method,
                *(f"**{t}**" if r == lowest else t for r, t in zip(rates, texts, strict=True)),
            ]
        )
    title = f"{label}: learning rates, validation loss in nats per token (mean over a method's adapters)"
    return Table(title, ["method", *(f"{rate:g}" for rate in rates)], rows) if rows else None


def traffic(settings: Settings, results: Results, world: str) -> Table | None:
    """Return the bytes that all clients send and receive in a round."""
    rows = []
    for scenario in settings.worlds[world].scenarios or settings.scenarios:
        for method in settings.worlds[world].methods or settings.methods:
            lines = results.of(world, scenario, method)
            if lines:
                size = np.mean([line["traffic"]["bytes_per_round"] for line in lines]) / 2**20
                rows.append([scenario, method, f"{size:.1f}"])
    label = settings.worlds[world].label or world
    title = f"{label}: MiB that all clients send and receive in a round"
    return Table(title, ["scenario", "method", "MiB"], rows) if rows else None


def tidy(results: Results) -> str:
    """Return all scores as CSV, one line per cell, evaluation and task."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["world", "scenario", "method", "seed", "routing", "tests", "task", *METRICS, "engine"])
    for line in results.lines:
        cell = [line["world"], line["scenario"], line["method"], line["seed"]]
        for name in line["scores"]:
            for task, means in evaluation(line, name)["tasks"].items():
                writer.writerow([*cell, *name.split("/"), task, *(means[m] for m in METRICS), line["engine"]])
    return text.getvalue()


def against_best(
    settings: Settings, results: Results, world: str, scenario: str, tests: str, routed: bool
) -> Gain | None:
    """Return FedRouter's gain over the best baseline that does not know the tasks."""
    other = best(results, world, scenario, baselines(settings, world, tests, routed))
    if other is None:
        return None
    return gain(results, world, scenario, native(OURS, tests, settings), other)


def spread(mean: float, deviation: float) -> str:
    """Format a mean with its standard deviation, if there is one."""
    return f"{mean:.3f}" if np.isnan(deviation) else f"{mean:.3f} ± {deviation:.3f}"


def gain_text(found: Gain | None) -> str:
    """Format a gain with its interval."""
    return f"{found.gain:+.1%} [{found.low:+.1%}, {found.high:+.1%}]" if found else ""


def name_of(method: str, routing: str, published: str) -> str:
    """Return a method's name, with its routing if that is not the published one."""
    return (
        method
        if routing == published
        else f"{method}, {'routed' if routing == 'global' else 'local routing'}"
    )


def _latex_row(cells: Sequence[str]) -> str:
    escaped = [
        c.replace("%", r"\%")
        .replace("_", r"\_")
        .replace("±", r"$\pm$")
        .replace("÷", r"$\div$")
        .replace("**", "")
        for c in cells
    ]
    return f"{' & '.join(escaped)} \\\\"
