"""Pictures as plain SVG: curves of abstention, and a map of prompts before and after the transform."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.manifold import TSNE

from fedrouter.types import Array, RoutingSpace

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
SIZE, EDGE = 420, 40


def abstention(path: Path, known: np.ndarray, unknown: np.ndarray) -> None:
    """Draw the shares of known and unseen prompts rejected, over the radius' factor from 0 to 3."""
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
    """Draw t-SNE maps of embedded prompts as they come (left) and in the routing space (right).

    Crosses are centroids, black rings prompts that were routed wrongly.
    """
    chosen = np.random.default_rng(0).permutation(len(vectors))[:num]
    after = (vectors[chosen] - space.mean) @ space.transform
    names = sorted(set(tasks))
    body = []
    for side, points in enumerate((vectors[chosen], np.concatenate([after, space.centroids]))):
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
