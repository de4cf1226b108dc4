"""The figures of a report, drawn from ``Facts``; figures without data are left out."""

import io
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from fedrouter.plots import COLOURS, STYLE, colours, hide_axes, panels
from fedrouter.report.gather import Facts

DPI = 150
MAX_NAMES, MAX_INSIDE = 12, 4  # in a legend, and in one that may lie over lines
BLUES = LinearSegmentedColormap.from_list("blues", ["#ffffff", COLOURS[0]])


def figures(facts: Facts) -> Iterator[tuple[str, str, Figure]]:
    """Yield name, title and figure of every figure that there is data for."""
    every: Sequence[tuple[str, str, Callable[[Facts], Figure | None]]] = (
        ("losses", "Losses by round", losses),
        ("tsne", "Client embeddings (t-SNE)", embeddings),
        ("confusion", "Where test prompts go", confusion),
        ("calibration", "Calibration", calibration),
        ("abstention", "Abstention", abstention),
        ("costs", "Bytes and seconds by round", costs),
    )
    for name, title, draw in every:
        with mpl.rc_context(STYLE):
            figure = draw(facts)
        if figure is not None:
            yield name, title, figure


def drawn(figure: Figure) -> tuple[bytes, bytes]:
    """Return a figure as SVG and as PNG."""
    svg, png = io.BytesIO(), io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(png, format="png", dpi=DPI)
    return svg.getvalue(), png.getvalue()


def losses(facts: Facts) -> Figure | None:
    """Draw each task cluster's loss by round; validation losses dashed."""
    by_cluster: dict[str, list[Any]] = defaultdict(list)
    for line in facts.run["rounds"]:
        by_cluster[line["cluster"]].append(line)
    with_loss = {
        name: lines for name, lines in by_cluster.items() if any(line["loss"] is not None for line in lines)
    }
    if not with_loss:
        return None
    figure, axes = panels(1)
    for (name, lines), colour in zip(sorted(with_loss.items()), colours(len(with_loss)), strict=True):
        for key, style in (("loss", "-"), ("validation", "--")):
            points = [(line["round"] + 1, line[key]) for line in lines if line.get(key) is not None]
            if points:
                label = name if key == "loss" else None
                axes[0].plot(*zip(*points, strict=True), style, color=colour, marker="o", ms=3, label=label)
    axes[0].set(xlabel="round", ylabel="loss, nats per token", ylim=(0, None))
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    _legend(axes[0], len(with_loss))
    return figure


def embeddings(facts: Facts) -> Figure | None:
    """Draw the clients' embedded prompts, coloured by task and by task cluster (paper: Figure 4)."""
    if facts.tsne is None:
        return None
    points = np.array(facts.tsne["points"])
    figure, axes = panels(2, height=4.4)
    for panel, key, title in zip(axes, ("tasks", "clusters"), ("by task", "by task cluster"), strict=True):
        labels = np.array([str(label or "–") for label in facts.tsne[key]])
        names = sorted(set(labels))
        for name, colour in zip(names, colours(len(names)), strict=True):
            chosen = points[labels == name]
            panel.scatter(chosen[:, 0], chosen[:, 1], s=9, color=colour, alpha=0.75, linewidths=0, label=name)
        panel.set_title(title)
        hide_axes(panel)
        _legend(panel, len(names), below=True)
    return figure


def confusion(facts: Facts) -> Figure | None:
    """Draw the share of each task's test prompts by nearest task cluster."""
    if facts.routing is None:
        return None
    tasks = facts.routing.by_task
    names = sorted({name for task in tasks.values() for name in task.confusion})
    counts = np.array([[task.confusion.get(name, 0) for name in names] for task in tasks.values()])
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, [axes] = panels(1, height=1.3 + 0.42 * len(tasks))
    axes.imshow(shares, cmap=BLUES, vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(
        range(len(names)), [name or "(no text)" for name in names], rotation=20 if len(names) > 4 else 0
    )
    axes.set_yticks(range(len(tasks)), list(tasks))
    for row, column in np.ndindex(counts.shape) if counts.size <= 400 else ():
        if counts[row, column]:
            colour = "white" if shares[row, column] > 0.5 else "#333333"
            axes.text(
                column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=9
            )
    axes.set(xlabel="nearest task cluster", ylabel="task")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def calibration(facts: Facts) -> Figure | None:
    """Draw the cumulative distribution of distance ÷ radius of each task's test prompts."""
    if facts.routing is None:
        return None
    figure, [axes] = panels(1)
    shares = np.linspace(0, 1, 101)
    tasks = facts.routing.by_task
    for (name, task), colour in zip(tasks.items(), colours(len(tasks)), strict=True):
        axes.plot(task.ratios, shares, "-" if task.known else "--", color=colour, label=name)
    axes.axvline(1, color="#999999", lw=1)
    if facts.routing.stated is not None:
        axes.axhline(facts.routing.stated, color="#999999", lw=1, ls=":")
        axes.text(
            0.02,
            facts.routing.stated,
            f" stated {facts.routing.stated:.0%}",
            va="bottom",
            color="#666666",
            fontsize=9,
        )
    axes.set(xlabel="distance ÷ radius", ylabel="share of test prompts", xlim=(0, 2.5), ylim=(0, 1.03))
    _legend(axes, len(tasks))
    return figure


def abstention(facts: Facts) -> Figure | None:
    """Draw the shares of rejected and correctly routed prompts over a factor on all radii."""
    if facts.routing is None:
        return None
    figure, [axes] = panels(1)
    factors = [step.factor for step in facts.routing.curve]
    lines: tuple[tuple[str, Sequence[float | None]], ...] = (
        ("known tasks rejected", [step.known_rejected for step in facts.routing.curve]),
        ("unknown tasks rejected", [step.unknown_rejected for step in facts.routing.curve]),
        ("right, if answered", [step.answered_right for step in facts.routing.curve]),
    )
    for (label, values), colour in zip(lines, COLOURS, strict=False):
        points = [(x, y) for x, y in zip(factors, values, strict=True) if y is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", ms=4, label=label)
    axes.axvline(1, color="#999999", lw=1)
    axes.set(xlabel="radius ×", ylabel="share", ylim=(-0.02, 1.03))
    _legend(axes, 3)
    return figure


def costs(facts: Facts) -> Figure | None:
    """Draw the bytes of adapters sent to and from clients, and the seconds, of each round."""
    lines = [line for line in facts.run["rounds"] if "num_bytes" in line]
    if not lines:
        return None
    rounds = sorted({line["round"] for line in lines})
    sizes = [sum(line["num_bytes"] for line in lines if line["round"] == number) / 2**20 for number in rounds]
    seconds = [max(line["seconds"] for line in lines if line["round"] == number) for number in rounds]
    figure, axes = panels(2, height=2.6)
    for panel, values, unit in zip(
        axes, (sizes, seconds), ("MiB, to clients and back", "seconds"), strict=True
    ):
        panel.bar([number + 1 for number in rounds], values, color=COLOURS[0], width=0.7)
        panel.set(xlabel="round", ylabel=unit)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(visible=False, axis="x")
    return figure


def _legend(axes: Any, number: int, below: bool = False) -> None:
    under = {"markerscale": 2, "loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "ncols": 2}
    beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if number > MAX_INSIDE else {}
    if number <= MAX_NAMES:
        axes.legend(**(under if below else beside))
