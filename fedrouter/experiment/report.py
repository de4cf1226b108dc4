"""An experiment's results as a page, LaTeX tables, a CSV file and figures."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from fedrouter.errors import DataError
from fedrouter.experiment import pictures
from fedrouter.experiment.compare import OURS, Asked, Results, gain, native
from fedrouter.experiment.results import METRICS, RESULTS, Line, read_results, write_results
from fedrouter.experiment.settings import Settings
from fedrouter.experiment.tables import Table, against_best, gain_text, tables, tidy
from fedrouter.files import write_atomically
from fedrouter.plots import STYLE, write_svg

SETTINGS, PAGE = "experiment.json", "report.html"
HEAD = """<!doctype html><meta charset="utf-8"><title>Experiment</title><style>
body { font: 14px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
h2 { font-size: 1rem; margin: 2rem 0 .5rem }
div, figure { overflow-x: auto }
figure { margin: 2rem 0 }
table { border-collapse: collapse }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
td { font-variant-numeric: tabular-nums }
</style>"""
SIZES = (OURS, "fedavg", "local", "oracle")  # methods in the figure of scores over sizes of the base


def write_report(settings: Settings, lines: Mapping[str, Line], out: Path) -> list[Table]:
    """Write ``report.html``, ``report.md``, ``tables.tex``, ``scores.csv`` and ``figures/`` into ``out``."""
    results = Results(lines.values())
    found = [
        claims(settings, results),
        *tables(settings, results, [line for line in lines.values() if "loss" in line]),
    ]
    out.mkdir(parents=True, exist_ok=True)
    figures = draw(settings, results, out / "figures")
    sections = [f"## {table.title}\n\n{table.markdown()}\n" for table in found]
    sections += [f"![{name}](figures/{name}.svg)\n" for name in figures]
    write_atomically(out / PAGE, _page(found, figures, out / "figures"))
    write_results(out / RESULTS, lines)
    write_atomically(out / SETTINGS, settings.model_dump_json(indent=2) + "\n")
    write_atomically(out / "report.md", "\n".join(sections))
    write_atomically(out / "tables.tex", "\n\n".join(table.latex() for table in found) + "\n")
    write_atomically(out / "scores.csv", tidy(results))
    return found


def show_report(out: Path) -> Path:
    """Write an experiment's report again from its results; return the page's path.

    Raises
    ------
    DataError
        If ``out`` is not an experiment of this version.
    """
    try:
        settings = Settings.model_validate_json((out / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{out}: not the directory of an experiment: {SETTINGS} is missing or of another version"
        ) from error
    write_report(settings, read_results(out / RESULTS), out)
    return out / PAGE


def _page(found: Sequence[Table], names: Sequence[str], figures: Path) -> str:
    """Return one HTML file without external resources."""
    parts = [HEAD, "<h1>Experiment</h1>"]
    for table in found:
        parts += [f"<h2>{escape(table.title)}</h2>", "<div><table>", _html_row("th", table.columns)]
        parts += [_html_row("td", row) for row in table.rows]
        parts.append("</table></div>")
    parts += [f"<figure>{_inline(figures / f'{name}.svg')}</figure>" for name in names]
    return "\n".join(parts) + "\n"


def _html_row(cell: str, texts: Sequence[str]) -> str:
    shown = (escape(text.replace("**", "").replace("`", "")) for text in texts)
    return f"<tr>{''.join(f'<{cell}>{text}</{cell}>' for text in shown)}</tr>"


def claims(settings: Settings, results: Results) -> Table:
    """Return the paper's claims and the measured values, world by world."""
    rows = []
    for world, shown in settings.worlds.items():
        label = shown.label or world
        ours, local = native(OURS, "all", settings), Asked("local", "local", "all")
        for other, wanted, name in (
            (local, 1.36, "over `local`, each client with its own adapter"),
            (Asked("local", "global", "all"), None, "over `local` behind our router"),
            (Asked("fedavg", "global", "all"), 0.0, "over `fedavg`"),
        ):
            found = gain(results, world, "single", ours, other) if other.method in settings.methods else None
            if found:
                reached = "" if wanted is None else _yes(found.gain >= wanted)
                goal = "" if wanted is None else f"≥ {wanted:+.0%}" if wanted else "> 0"
                rows.append([f"{label}: single, all tests, {name}", gain_text(found), goal, reached])
        for scenario in ("dual", "all"):
            for routed in (False, True):
                found = against_best(settings, results, world, scenario, "own", routed)
                if found is None:
                    continue
                behind = "our router before baselines too" if routed else "as published"
                over = f"the best baseline ({behind}: `{found.over.method}`)"
                name = f"{label}: {scenario}, own tests, over {over}"
                reached = "" if routed else _yes(found.gain >= 0.061)
                rows.append([name, gain_text(found), "" if routed else "≥ +6.1 %", reached])
        for scenario in shown.scenarios or settings.scenarios:
            found = gain(results, world, scenario, ours, Asked("oracle", "global", "all"))
            if found:
                rows.append(
                    [
                        f"{label}: {scenario}, of the oracle's score",
                        f"{1 + found.gain:.3f}",
                        "≥ 0.99",
                        _yes(found.gain >= -0.01),
                    ]
                )
            if shown.metric == "exact_match":
                points = _points(settings, results, world, scenario)
                if points is not None:
                    rows.append(
                        [
                            f"{label}: {scenario}, points of exact match over `fedavg`",
                            f"{points:+.1f}",
                            "≥ +3",
                            _yes(points >= 3),
                        ]
                    )
    return Table(
        "What the paper claims, and what was measured here", ["claim", "measured", "wanted", ""], rows
    )


def draw(settings: Settings, results: Results, out: Path) -> list[str]:
    """Draw all figures that there are results for; return their names."""
    names = []
    with mpl.rc_context(STYLE):
        for name, figure in _figures(settings, results):
            write_svg(figure, out / f"{name}.svg")
            names.append(name)
    return names


def _figures(settings: Settings, results: Results) -> Iterator[tuple[str, Figure]]:
    sizes: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for world, shown in settings.worlds.items():
        label, unit = shown.label or world, METRICS[shown.metric]
        methods = [m for m in shown.methods or settings.methods if results.of(world, "single", m)]
        if methods:
            values: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
            for method in methods:
                asked = native(method, "all", settings)
                found = results.scores(world, "single", asked)
                assert found is not None
                tasks = sorted(results.of(world, "single", method)[0]["scores"]["global/all"]["prompts"])
                for task, prompts in zip(tasks, found.prompts, strict=True):
                    seeds = prompts.mean(axis=1)
                    deviation = float(seeds.std(ddof=1)) if len(seeds) > 1 else math.nan
                    values[task][method] = float(seeds.mean()), deviation
            yield f"{world}-tasks", pictures.bars(f"{label}: single, scored on all tasks", values, unit)
        sent, losses, curves = {}, {}, {}
        for method in shown.methods or settings.methods:
            lines = results.of(world, "dual", method)
            if not lines:
                continue
            sent[method] = (
                float(np.mean([line["traffic"]["bytes_per_round"] for line in lines])) / 2**20,
                math.nan,
            )
            by_seed = [line["rounds"] for line in lines]
            validation = [
                (float(n + 1), float(np.mean([rounds[n]["validation"] for rounds in by_seed])))
                for n in range(min(map(len, by_seed)))
                if all("validation" in rounds[n] for rounds in by_seed)
            ]
            if validation:
                losses[method] = validation
            if lines[0].get("curve"):
                curves[method] = [(float(n), score) for n, score in enumerate(lines[0]["curve"], start=1)]
            if lines[0].get("map"):
                title = f"{label}: clients' prompts, t-SNE of their vectors"
                yield f"{world}-map", pictures.embedding_map(title, lines[0]["map"])
            if shown.parameters and shown.metric == "rouge_1" and method in SIZES:
                found = results.scores(world, "dual", native(method, "own", settings))
                if found:
                    sizes[method].append((float(shown.parameters), found.mean))
        if sent:
            title = f"{label}: dual, MiB sent and received by all clients in a round"
            yield f"{world}-bytes", pictures.bars(title, {"": sent}, "MiB")
        if losses:
            title = f"{label}: dual, validation loss over rounds"
            yield f"{world}-loss", pictures.lines(title, losses, "round", "nats per token")
        if curves:
            title = f"{label}: dual, one seed, score over rounds"
            yield f"{world}-curve", pictures.lines(title, curves, "round", unit)
    if sizes and max(map(len, sizes.values())) > 1:
        title = "dual, own tests: score over the size of the base"
        yield "sizes", pictures.lines(title, sizes, "parameters", METRICS["rouge_1"], logarithmic=True)


def _points(settings: Settings, results: Results, world: str, scenario: str) -> float | None:
    ours = results.scores(world, scenario, native(OURS, "all", settings))
    other = results.scores(world, scenario, Asked("fedavg", "global", "all"))
    if ours is None or other is None:
        return None
    seeds = sorted(set(ours.seeds) & set(other.seeds))
    a, b = (results.scores(world, scenario, Asked(m, "global", "all"), seeds) for m in (OURS, "fedavg"))
    return 100 * (a.mean - b.mean) if a and b else None


def _inline(file: Path) -> str:
    """Return an SVG file without its XML header, to be part of a page."""
    return "<svg" + file.read_text(encoding="utf-8").partition("<svg")[2]


def _yes(reached: bool) -> str:
    return "yes" if reached else "**no**"
