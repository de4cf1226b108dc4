"""``tsne.json``: the clients' embedded prompts in two dimensions (paper: Figure 4), for ``fedrouter report``.

Training writes it because only the clients hold the vectors, and here they run in this process. The file
holds one point per row and no text. It stays in the run's directory and is not part of the bundle.
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
    """Write the t-SNE positions, tasks and task clusters of at limit equally many rows of each client.

    Parameters
    ----------
    names : names of the task clusters.
    """
    limit = max(2, MAX_POINTS // max(len(clients), 1))
    rng = np.random.default_rng(seed)
    vectors, points = [], []
    for client in clients:
        client_vectors, tasks, clusters = client.placed()
        chosen = np.sort(rng.permutation(len(client_vectors))[:limit])
        vectors.append(client_vectors[chosen])
        points += [(client.name, tasks[i], names[k] if (k := clusters[i]) >= 0 else None) for i in chosen]
    stacked = np.concatenate(vectors)
    perplexity = min(PERPLEXITY, (len(stacked) - 1) / 3)
    points_2d = TSNE(perplexity=perplexity, init="pca", random_state=seed % 2**32).fit_transform(stacked)
    columns = zip(*points, strict=True)
    content = dict(zip(("clients", "tasks", "clusters"), map(list, columns), strict=True))
    content |= {"points": np.round(points_2d.astype(float), 2).tolist()}
    write_atomically(out / FILE, json.dumps(content, ensure_ascii=False) + "\n")
