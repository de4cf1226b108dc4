"""Alternatives to FedRouter's routing with the same embedder; both need all rows and labels in one place."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from routing_data import Remembering
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from fedrouter.embed import routing_text
from fedrouter.types import Array, Record

INSTALL = "pip install --no-deps semantic-router==1.1.1 (docs/evaluation.md names what else it imports)"


def nearest_rows(embedder: Remembering, taken: Sequence[Record], judged: Sequence[Record]) -> float:
    """Return the accuracy of a cosine 10-nearest-neighbours classifier on training rows, for reference."""
    fitted = KNeighborsClassifier(10, metric="cosine").fit(embedder.prompts(taken), [r.task for r in taken])
    return mean_over_tasks(fitted.predict(embedder.prompts(judged)), judged)


def semantic_router(
    embedder: Remembering,
    taken: Sequence[Record],
    judged: Sequence[Record],
    unseen: dict[str, Array],
    num: int | None,
) -> tuple[float, float] | None:
    """Return accuracy and mean AUROC of the package semantic-router; None if it is not installed.

    Parameters
    ----------
    num : utterances per route; None: all rows.
    """
    try:
        from semantic_router import Route
        from semantic_router.encoders import DenseEncoder
        from semantic_router.routers import IndexedRouter
    except ImportError as error:
        print(f"skipped: semantic-router does not import ({error}); {INSTALL}")
        return None

    class Same(DenseEncoder):  # type: ignore[misc]  # untyped where it is not installed
        name: str = "the same embedder"

        def __call__(self, docs: list[str]) -> list[list[float]]:
            return known(docs)

    vectors = {f"unseen {task} {i}": v for task, rows in unseen.items() for i, v in enumerate(rows)}

    def known(docs: list[str]) -> list[list[float]]:
        return [(vectors[d] if d in vectors else embedder.embed([d])[0]).tolist() for d in docs]

    utterances: defaultdict[str | None, list[str]] = defaultdict(list)
    for r in taken:
        if num is None or len(utterances[r.task]) < num:
            utterances[r.task].append(routing_text(r.turns))
    router = IndexedRouter(
        Same(), [Route(name=str(task), utterances=texts) for task, texts in utterances.items()]
    )
    picks = [router(routing_text(r.turns)) for r in judged]
    weights = task_weights(judged)
    near = np.array([pick.confidence for pick in picks])
    aurocs = []
    for task, rows in unseen.items():
        far = np.array([router(f"unseen {task} {i}").confidence for i in range(len(rows))])
        aurocs.append(auroc(-near, weights, -far))
    return mean_over_tasks([pick.name for pick in picks], judged), float(np.mean(aurocs))


def auroc(known: np.ndarray, weights: np.ndarray, strange: np.ndarray) -> float:
    """Return the AUROC of a score that should be larger for strange prompts; known ones have weights."""
    truth = np.repeat([0, 1], [len(known), len(strange)])
    all_weights = np.r_[weights, np.full(len(strange), 1 / len(strange))]
    return float(roc_auc_score(truth, np.r_[known, strange], sample_weight=all_weights))


def task_weights(judged: Sequence[Record]) -> np.ndarray:
    """Return weights that sum to 1, with equal sums for tasks."""
    tasks = np.array([r.task for r in judged])
    weights = 1 / np.array([(tasks == t).sum() for t in tasks])
    return np.asarray(weights / weights.sum())


def mean_over_tasks(names: Sequence[str], judged: Sequence[Record]) -> float:
    """Return the accuracy, averaged over tasks."""
    right = np.array([name == r.task for name, r in zip(names, judged, strict=True)])
    return float(right @ task_weights(judged))
