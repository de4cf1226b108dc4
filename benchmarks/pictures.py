"""Figures as SVG: maps of prompts, confusion, abstention and ROC curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.manifold import TSNE
from sklearn.metrics import roc_curve

from fedrouter.types import Array, Record, RoutingSpace

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
SIZE, EDGE = 420, 40


def draw(
    target: Path,
    stem: str,
    vectors: Array,
    judged: Sequence[Record],
    measured: Mapping[str, Any],
    drawn: Mapping[str, Any],
) -> None:
    """Write all figures of one federation."""
    target.mkdir(exist_ok=True)
    abstention(target / f"{stem}-abstention.svg", drawn["far"], drawn["strange"])
    roc(target / f"{stem}-roc.svg", drawn["far"], drawn["strange"], drawn["weights"])
    confusion(target / f"{stem}-confusion.svg", measured["confusion"])
    neighbours(
        target / f"{stem}-map.svg", vectors, [str(r.task) for r in judged], drawn["space"], drawn["right"]
    )


def roc(path: Path, known: np.ndarray, unknown: np.ndarray, weights: np.ndarray) -> None:
    """Draw the share of unseen prompts rejected over that of known ones, with equal weights for tasks."""
    truth = np.repeat([0, 1], [len(known), len(unknown)])
    all_weights = np.r_[weights, np.full(len(unknown), 1 / len(unknown))]
    false, true, _ = roc_curve(truth, np.r_[known, unknown], sample_weight=all_weights)
    points = " ".join(f"{_at(x)},{_at(1 - y)}" for x, y in zip(false, true, strict=True))
    body = [
        f'<polyline fill="none" stroke="{COLOURS[0]}" stroke-width="2" points="{points}"/>',
        f'<line x1="{_at(0)}" y1="{_at(1)}" x2="{_at(1)}" y2="{_at(0)}" stroke="#999" stroke-dasharray="4"/>',
        _text(EDGE, 20, "share of unseen prompts rejected, 0 … 1"),
        _text(EDGE, SIZE - 12, "share of known prompts rejected, 0 … 1"),
    ]
    _write(path, SIZE, body)


def confusion(path: Path, counts: Mapping[str, Mapping[str, int]]) -> None:
    """Draw counts of prompts by task (rows) and by the routed cluster's task (columns)."""
    tasks = sorted({*counts, *(name for row in counts.values() for name in row)})
    left, step = 150, (2 * SIZE - 190) / max(len(tasks), 1)
    height = (SIZE - 2 * EDGE) / max(len(tasks), 1)
    body = [_text(EDGE, 20, "prompts of a task (row) by the task of the cluster that they went to (column)")]
    for r, task in enumerate(tasks):
        top = EDGE + 20 + r * height
        body.append(_text(10, top + height / 2, task))
        body.append(_text(left + r * step + 8, EDGE + 14, task))
        total = max(sum(counts.get(task, {}).values()), 1)
        for c, other in enumerate(tasks):
            num = counts.get(task, {}).get(other, 0)
            colour = COLOURS[0] if r == c else COLOURS[1]
            body.append(
                f'<rect x="{left + c * step:.0f}" y="{top:.0f}" width="{step - 4:.0f}" '
                f'height="{height - 4:.0f}" fill="{colour}" fill-opacity="{max(num / total, 0.04):.2f}"/>'
            )
            body.append(_text(left + c * step + step / 2 - 8, top + height / 2, str(num)))
    _write(path, 2 * SIZE, body)


def abstention(path: Path, known: np.ndarray, unknown: np.ndarray) -> None:
    """Draw the shares of known and unseen prompts rejected over a factor on all radii, from 0 to 3."""
    factors = np.linspace(0, 3, 121)
    body = []
    for colour, label, far, line in (
        (COLOURS[0], "known tasks", known, 0),
        (COLOURS[1], "unseen tasks", unknown, 1),
    ):
        shares = [(far > factor).mean() for factor in factors]
        points = " ".join(f"{_at(f / 3)},{_at(1 - s)}" for f, s in zip(factors, shares, strict=True))
        body.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"/>')
        body.append(_text(SIZE - 130, EDGE + 18 * line, label, colour))
    middle, bottom = _at(1 / 3), SIZE - EDGE
    body.append(
        f'<line x1="{middle}" x2="{middle}" y1="{EDGE}" y2="{bottom}" stroke="#999" stroke-dasharray="4"/>'
    )
    body.append(_text(EDGE, SIZE - 12, "factor on the radius: 0 … 3, dashed: 1"))
    body.append(_text(EDGE, 20, "share rejected"))
    _write(path, SIZE, body)


def neighbours(
    path: Path, vectors: Array, tasks: Sequence[str], space: RoutingSpace, right: np.ndarray, num: int = 400
) -> None:
    """Draw t-SNE maps of embedded prompts (left) and of the same in the routing space (right).

    Crosses are centroids; black rings mark prompts that were routed wrongly.
    """
    chosen = np.random.default_rng(0).permutation(len(vectors))[:num]
    transformed = (vectors[chosen] - space.mean) @ space.transform
    names = sorted(set(tasks))
    body = []
    for side, points in enumerate((vectors[chosen], np.concatenate([transformed, space.centroids]))):
        flat = TSNE(perplexity=30, random_state=0, init="pca").fit_transform(points)
        flat = (flat - flat.min(0)) / np.maximum(np.ptp(flat, axis=0), 1e-9)
        for i, (x, y) in enumerate(flat):
            left, top = _at(x) + side * SIZE, _at(y)
            if i >= len(chosen):
                body.append(
                    f'<path d="M{left - 5},{top}h10M{left},{top - 5}v10" stroke="#000" stroke-width="2"/>'
                )
                continue
            ring = "" if right[chosen[i]] else ' stroke="#000" stroke-width="2"'
            colour = COLOURS[names.index(tasks[chosen[i]]) % len(COLOURS)]
            body.append(f'<circle cx="{left}" cy="{top}" r="3" fill="{colour}"{ring}/>')
    body += [_text(EDGE + 150 * i, SIZE - 8, name, COLOURS[i % len(COLOURS)]) for i, name in enumerate(names)]
    body += [_text(EDGE, 20, "embeddings"), _text(SIZE + EDGE, 20, "routing space; crosses: centroids")]
    _write(path, 2 * SIZE, body)


def _at(share: float) -> float:
    return round(EDGE + float(share) * (SIZE - 2 * EDGE), 1)


def _text(x: float, y: float, text: str, colour: str = "#333") -> str:
    return f'<text x="{x}" y="{y}" font-family="sans-serif" font-size="12" fill="{colour}">{text}</text>'


def _write(path: Path, width: int, body: Sequence[str]) -> None:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{SIZE}" style="background:#fff">'
    path.write_text("\n".join([head, *body, "</svg>"]) + "\n", encoding="utf-8")
