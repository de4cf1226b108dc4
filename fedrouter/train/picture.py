"""``tsne.json``: the clients' embedded prompts in two dimensions (paper: Figure 4), for ``fedrouter report``.

It is made here because the vectors are here: all clients are in this process. It holds a point a row and no
text; it stays beside the run and is in no bundle.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.manifold import TSNE

from fedrouter.files import write_atomically
from fedrouter.train.client.client import Client

FILE = "tsne.json"
MAX_POINTS = 600  # two seconds on one core
PERPLEXITY = 30.0


def draw(clients: Sequence[Client], names: Sequence[str], out: Path, seed: int) -> None:
    """Write where t-SNE puts the clients' rows, alike many of each, with their tasks and task clusters.

    Parameters
    ----------
    names : of the task clusters.
    """
    most = max(2, MAX_POINTS // max(len(clients), 1))
    rng = np.random.default_rng(seed)
    vectors, points = [], []
    for client in clients:
        found, tasks, clusters = client.placed()
        chosen = np.sort(rng.permutation(len(found))[:most])
        vectors.append(found[chosen])
        points += [(client.name, tasks[i], names[k] if (k := clusters[i]) >= 0 else None) for i in chosen]
    stacked = np.concatenate(vectors)
    perplexity = min(PERPLEXITY, (len(stacked) - 1) / 3)
    flat = TSNE(perplexity=perplexity, init="pca", random_state=seed % 2**32).fit_transform(stacked)
    columns = zip(*points, strict=True)
    content = dict(zip(("clients", "tasks", "clusters"), map(list, columns), strict=True))
    content |= {"points": np.round(flat.astype(float), 2).tolist()}
    write_atomically(out / FILE, json.dumps(content, ensure_ascii=False) + "\n")
