"""The paper's figures as plain SVG."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#222255")
HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 380, 60, 52, 50, 150
PLOT = HEIGHT - TOP - BOTTOM

Point = tuple[float, float]
Series = Mapping[str, Sequence[Point]]


def bars(path: Path, title: str, values: Mapping[str, Mapping[str, tuple[float, float]]], unit: str) -> None:
    """Draw groups of bars with their standard deviations.

    Parameters
    ----------
    values : by group, then by series: (mean, standard deviation or nan).
    """
    series = list(dict.fromkeys(name for group in values.values() for name in group))
    width = max(14, min(26, 640 // max(1, len(values) * (len(series) + 1))))
    right = LEFT + max(360, len(values) * (len(series) + 1) * width)
    top = _ceiling(m + (0 if math.isnan(d) else d) for group in values.values() for m, d in group.values())
    body = [_text(14, 18, title, bold=True), *_scale(top, right, unit)]
    for g, (group, by_series) in enumerate(values.items()):
        start = LEFT + g * (len(series) + 1) * width + width / 2
        body.append(_text(start, HEIGHT - BOTTOM + 18, group))
        for s, name in enumerate(series):
            if name not in by_series:
                continue
            mean, deviation = by_series[name]
            x, y = start + s * width, _y(mean / top)
            body.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - 3}" height="{_y(0) - y:.1f}" '
                f'fill="{_colour(s)}"><title>{escape(name)}, {escape(group)}: {mean:.3f}</title></rect>'
            )
            if not math.isnan(deviation):
                middle = x + (width - 3) / 2
                low, high = _y(max(mean - deviation, 0) / top), _y((mean + deviation) / top)
                body.append(f'<path d="M{middle:.1f},{low:.1f}V{high:.1f}" stroke="#333"/>')
    _write(path, right, body, series)


def lines(path: Path, title: str, series: Series, along: str, unit: str, logarithmic: bool = False) -> None:
    """Draw lines through points; ``logarithmic`` is for the horizontal axis."""
    points = [point for line in series.values() for point in line]
    place = math.log10 if logarithmic else float
    xs = [place(x) for x, _ in points]
    least, most = min(xs), max(xs)
    top = _ceiling(y for _, y in points)
    right = LEFT + 520
    body = [_text(14, 18, title, bold=True), *_scale(top, right, unit), _text(LEFT, HEIGHT - 12, along)]

    def at(x: float) -> float:
        return LEFT + 20 + (place(x) - least) / max(most - least, 1e-9) * (right - LEFT - 40)

    for x in sorted({x for x, _ in points}):
        shown = f"{x / 1e6:.3g} M" if logarithmic else f"{x:g}"
        body.append(_text(at(x) - 10, HEIGHT - BOTTOM + 18, shown))
    for s, line in enumerate(series.values()):
        path_points = " ".join(f"{at(x):.1f},{_y(y / top):.1f}" for x, y in sorted(line))
        body.append(f'<polyline fill="none" stroke="{_colour(s)}" stroke-width="2" points="{path_points}"/>')
        body += [
            f'<circle cx="{at(x):.1f}" cy="{_y(y / top):.1f}" r="3" fill="{_colour(s)}"/>' for x, y in line
        ]
    _write(path, right, body, list(series))


def embedding_map(path: Path, title: str, rows: Sequence[Sequence[Any]]) -> None:
    """Draw a map of clients' rows, (x, y, task, client), with one colour per task."""
    tasks = sorted({str(row[2]) for row in rows})
    xs, ys = [float(row[0]) for row in rows], [float(row[1]) for row in rows]
    right = LEFT + PLOT * 1.4
    body = [_text(14, 18, title, bold=True)]
    for x, y, task, client in rows:
        left = LEFT + (x - min(xs)) / max(max(xs) - min(xs), 1e-9) * (right - LEFT)
        down = _y((y - min(ys)) / max(max(ys) - min(ys), 1e-9))
        body.append(
            f'<circle cx="{left:.1f}" cy="{down:.1f}" r="3" fill="{_colour(tasks.index(str(task)))}" '
            f'fill-opacity="0.75"><title>{escape(str(task))}, {escape(str(client))}</title></circle>'
        )
    _write(path, right, body, tasks)


def _scale(top: float, right: float, unit: str) -> list[str]:
    body = [_text(14, TOP - 12, unit)]
    for step in range(6):
        y = _y(step / 5)
        body.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        body.append(_text(14, y + 4, f"{top * step / 5:.3g}"))
    return body


def _ceiling(values: Any) -> float:
    most = max(values, default=1.0) or 1.0
    unit = 10 ** math.floor(math.log10(most))
    return float(next(n * unit for n in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if n * unit >= most))


def _y(share: float) -> float:
    return TOP + (1 - share) * PLOT


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _text(x: float, y: float, text: str, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-family="sans-serif" font-size="12" fill="#333"{weight}>'
        f"{escape(text)}</text>"
    )


def _write(path: Path, right: float, body: Sequence[str], names: Sequence[str]) -> None:
    width = round(right + LEGEND + 20)
    legend = []
    for i, name in enumerate(names):
        y = TOP + 18 * i
        legend.append(f'<rect x="{right + 16:.0f}" y="{y - 9}" width="10" height="10" fill="{_colour(i)}"/>')
        legend.append(_text(right + 32, y, name))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" style="background:#fff">'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head, *body, *legend, "</svg>"]) + "\n", encoding="utf-8")
