"""The paper's figures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedrouter.plots import colours, hide_axes, panels

Series = Mapping[str, Sequence[tuple[float, float]]]


def bars(title: str, values: Mapping[str, Mapping[str, tuple[float, float]]], unit: str) -> Figure:
    """Draw groups of bars with their standard deviations.

    Parameters
    ----------
    values : by group, then by series: (mean, standard deviation or nan).
    """
    series = list(dict.fromkeys(name for group in values.values() for name in group))
    figure, [axes] = panels(1)
    places = np.arange(len(values), dtype=float)
    width = 0.8 / len(series)
    for i, (name, colour) in enumerate(zip(series, colours(len(series)), strict=True)):
        found = [group.get(name, (math.nan, math.nan)) for group in values.values()]
        means, deviations = zip(*found, strict=True)
        left = places - 0.4 + (i + 0.5) * width
        axes.bar(left, means, 0.9 * width, color=colour, label=name, yerr=deviations, error_kw={"lw": 0.8})
    crowded = max(map(len, values)) * len(values) > 70
    axes.set_xticks(places, list(values), rotation=20 if crowded else 0, ha="right" if crowded else "center")
    axes.grid(visible=False, axis="x")
    axes.set(title=title, ylabel=unit, ylim=(0, None))
    return _with_legend(figure)


def lines(title: str, series: Series, along: str, unit: str, logarithmic: bool = False) -> Figure:
    """Draw lines through points; ``logarithmic`` is for the horizontal axis."""
    figure, [axes] = panels(1)
    for (name, points), colour in zip(series.items(), colours(len(series)), strict=True):
        axes.plot(*zip(*sorted(points), strict=True), color=colour, marker="o", ms=3, label=name)
    axes.set(title=title, xlabel=along, ylabel=unit, ylim=(0, None))
    if logarithmic:
        sizes = sorted({x for points in series.values() for x, _ in points})
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{x / 1e6:.3g} M" for x in sizes])
        axes.set_xticks([], minor=True)
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
    return _with_legend(figure)


def embedding_map(title: str, rows: Sequence[Sequence[Any]]) -> Figure:
    """Draw a map of clients' rows, (x, y, task, client), with one colour per task."""
    tasks = sorted({str(row[2]) for row in rows})
    figure, [axes] = panels(1, height=4.4)
    for task, colour in zip(tasks, colours(len(tasks)), strict=True):
        xs, ys = zip(*((float(x), float(y)) for x, y, label, _ in rows if str(label) == task), strict=True)
        axes.scatter(xs, ys, s=9, color=colour, alpha=0.75, linewidths=0, label=task)
    axes.set_title(title)
    hide_axes(axes)
    return _with_legend(figure)


def _with_legend(figure: Figure) -> Figure:
    figure.legend(loc="outside right upper")
    return figure
