"""A report as one HTML file without external resources; its figures also as SVG and PNG files."""

import base64
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from fedrouter import __version__
from fedrouter.files import write_atomically, writing
from fedrouter.layout import size_text
from fedrouter.report.figures import drawn, figures
from fedrouter.report.gather import Facts, gather

NAME = "report.html"


def write_report(
    run: Path,
    data: Sequence[str] | None = None,
    *,
    base: str | None = None,
    embedder_url: str | None = None,
) -> Path:
    """Write ``report.html`` into a run, and its figures into ``report/``; return the page's path.

    Parameters
    ----------
    data : test records with tasks, for confusion, calibration and abstention; None: the test split of the
        built-in data that the run was trained on.

    Raises
    ------
    DataError, BundleError, ModelError, ConfigError
        If the run, its bundle or the data cannot be used, or the report cannot be written.
    """
    facts = gather(run, data, base, embedder_url)
    directory = run / "report"
    with writing(directory):
        directory.mkdir(exist_ok=True)
    images = {}
    for name, title, figure in figures(facts):
        svg, png = drawn(figure)
        with writing(directory / name):
            (directory / f"{name}.svg").write_bytes(svg)
            (directory / f"{name}.png").write_bytes(png)
        source = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode('ascii')}"
        images[name] = {"title": title, "source": source}
    template = (files("fedrouter.report") / "report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["share"] = lambda value: "–" if value is None else f"{value:.1%}"
    page = environment.from_string(template).render(
        facts=facts,
        figures=images,
        summary=_summary(facts),
        losses=_first_and_last_losses(facts),
        settings=list(_flat(facts.run["config"])),
        version=__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    with writing(run / NAME):
        write_atomically(run / NAME, page)
    return run / NAME


def _summary(facts: Facts) -> list[tuple[str, str]]:
    """Return the numbers at the top of the page with their labels."""
    rounds = facts.run["rounds"]
    clusters = facts.bundle["clusters"] if facts.bundle else []
    clients = {client for cluster in clusters for client in cluster["clients"]}
    found = [(f"{facts.run['num_rounds']} of {facts.run['config']['train']['rounds']}", "rounds")]
    if clusters:
        rows = sum(cluster["num_examples"] for cluster in clusters)
        found += [
            (str(len(clusters)), "task clusters"),
            (str(len(clients)), "clients"),
            (f"{rows:,}", "rows"),
        ]
    if facts.routing is not None and facts.routing.accuracy is not None:
        found.append((f"{facts.routing.accuracy:.1%}", "test prompts to their task's cluster"))
    measured = [line for line in rounds if "num_bytes" in line]
    if measured:
        size = sum(line["num_bytes"] for line in measured)
        seconds = sum({line["round"]: line["seconds"] for line in measured}.values())
        found += [(size_text(size), "adapters, to clients and back"), (_time(seconds), "of rounds")]
    return found


def _first_and_last_losses(facts: Facts) -> dict[str, tuple[float, float]]:
    """Return the first and last loss of each task cluster."""
    found: dict[str, tuple[float, float]] = {}
    for line in facts.run["rounds"]:
        if line["loss"] is not None:
            first, _ = found.get(line["cluster"], (line["loss"], 0.0))
            found[line["cluster"]] = first, line["loss"]
    return found


def _flat(config: Mapping[str, Any], prefix: str = "") -> Any:
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
