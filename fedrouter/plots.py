"""The style that all figures share; drawn with Matplotlib."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure

COLOURS = ("#3568b8", "#d1495b", "#2a7f43", "#c08a00", "#0d8f9f", "#8e3b8a", "#7a5230", "#5b6770")
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": "#444444",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ececec",
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "fedrouter",  # makes files reproducible
    "axes.prop_cycle": cycler(color=COLOURS),
}


def panels(number: int, height: float = 3.2) -> tuple[Figure, list[Any]]:
    """Return a figure with ``number`` panels side by side, and its panels."""
    figure = Figure(figsize=(8.2, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, number)))


def colours(number: int) -> list[str]:
    """Return ``number`` colours; they repeat."""
    return [COLOURS[i % len(COLOURS)] for i in range(number)]


def hide_axes(panel: Any) -> None:
    """Hide a panel's axes: for maps, whose coordinates mean nothing."""
    panel.set(xticks=[], yticks=[])
    panel.grid(visible=False)
    panel.spines[:].set_visible(False)


def write_svg(figure: Figure, path: Path) -> None:
    """Write a figure as SVG whose text is text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({**STYLE, "svg.fonttype": "none"}):
        figure.savefig(path, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
