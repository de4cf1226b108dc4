"""Checkpoints of a run: one directory per round, written atomically; only the last few are kept."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedrouter.files import partial_directory
from fedrouter.train.state import Best, Clustering, RunState, Start, Validation
from fedrouter.types import AdapterState, Assignment, Member, RoutingSpace, TaskCluster


def save_checkpoint(
    directory: Path, state: RunState, digest: str, keep: int, clustering: Clustering | None = None
) -> None:
    """Write a checkpoint and delete all but the last ``keep``.

    Parameters
    ----------
    clustering : stored too; needed with ``cluster.every``, where discovery would not find it again.
    """
    final = directory / f"round-{state.number - 1:05d}"
    partial = partial_directory(final)
    for k, (adapter, moments) in enumerate(zip(state.adapters, state.moments, strict=True)):
        save_file(dict(adapter), partial / f"cluster-{k}.safetensors")
        if moments:
            save_file(dict(moments), partial / f"moments-{k}.safetensors")
        if best := state.best[k]:
            save_file(dict(best.adapter), partial / f"best-{k}.safetensors")
    record: dict[str, object] = {
        "clustering": digest,
        "losses": state.losses,
        "best": [best and {"round": best.round, "validation": best.validation} for best in state.best],
    }
    if clustering:
        space = clustering.space
        arrays = {"mean": space.mean, "transform": space.transform, "centroids": space.centroids}
        cluster_of = np.asarray(space.cluster_of, dtype=np.int64)
        save_file({**arrays, "cluster_of": cluster_of}, partial / "space.safetensors")
        record["clusters"] = [asdict(c) for c in clustering.clusters]
        record["ended"] = clustering.ended
    (partial / "state.json").write_text(json.dumps(record), encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in sorted(directory.glob("round-*"))[:-keep]:
        shutil.rmtree(old)


def latest_checkpoint(directory: Path, digest: str) -> RunState | None:
    """Return the state of the newest readable checkpoint with this clustering digest, if any."""
    for path in sorted(directory.glob("round-*"), reverse=True):
        try:
            saved = _record(path)
            if saved["clustering"] == digest:
                return _state(path, saved)
        except (OSError, ValueError, KeyError, SafetensorError):
            continue
    return None


def latest_clustering(directory: Path) -> Start | None:
    """Return the newest readable checkpoint that holds its task clusters, if any; without assignments."""
    for path in sorted(directory.glob("round-*"), reverse=True):
        try:
            saved, arrays = _record(path), load_file(path / "space.safetensors")
            cluster_of = tuple(int(k) for k in arrays.pop("cluster_of"))
            clusters = [TaskCluster(**{**c, "clients": tuple(c["clients"])}) for c in saved["clusters"]]
            clustering = Clustering(
                RoutingSpace(**arrays, cluster_of=cluster_of), (), clusters, tuple(saved["ended"])
            )
            return Start(clustering, _state(path, saved), str(saved["clustering"]))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            continue
    return None


def clustering_digest(
    space: RoutingSpace,
    assignments: Sequence[Assignment],
    members: Sequence[Member] = (),
) -> str:
    """Return a hash of the clustering and the clients' rows; it ties a checkpoint to them."""
    digest = hashlib.sha256(space.centroids.tobytes() + space.transform.tobytes())
    for assignment in assignments:
        digest.update(
            repr([(assignment.client, s.cluster, s.num_examples) for s in assignment.subsets]).encode()
        )
    for member in sorted(members, key=lambda member: member.client):
        digest.update(repr((member.client, member.digest)).encode())
    return digest.hexdigest()[:16]


def _record(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "state.json").read_text(encoding="utf-8")))


def _state(path: Path, saved: Mapping[str, Any]) -> RunState:
    losses = tuple(saved["losses"])
    return RunState(
        number=int(path.name.split("-")[1]) + 1,
        adapters=tuple(load_file(path / f"cluster-{k}.safetensors") for k in range(len(losses))),
        moments=tuple(_load_if_exists(path / f"moments-{k}.safetensors") for k in range(len(losses))),
        losses=losses,
        best=tuple(
            best and _best(best, path / f"best-{k}.safetensors") for k, best in enumerate(saved["best"])
        ),
    )


def _best(saved: Mapping[str, Any], adapter: Path) -> Best:
    validation = {client: Validation(*found) for client, found in saved["validation"].items()}
    return Best(saved["round"], validation, load_file(adapter))


def _load_if_exists(file: Path) -> AdapterState:
    return load_file(file) if file.exists() else {}
