"""What an interrupted run resumes from: one directory a round, written atomically, the last few kept."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedrouter.train.server import RoundResult
from fedrouter.types import AdapterState, Assignment, RoutingSpace


def save_checkpoint(directory: Path, result: RoundResult, digest: str, keep: int) -> None:
    """Write a round's adapters under a temporary name, rename, and keep only the last ``keep`` rounds."""
    final = directory / f"round-{result.number:05d}"
    partial = directory / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for k, adapter in enumerate(result.adapters):
        save_file(dict(adapter), partial / f"cluster-{k}.safetensors")
    state = {
        "clustering": digest,
        "clusters": [
            {"cluster": c.cluster, "loss": c.loss, "num_examples": c.num_examples} for c in result.clusters
        ],
    }
    (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in sorted(directory.glob("round-*"))[:-keep]:
        shutil.rmtree(old)


def latest_checkpoint(
    directory: Path, digest: str
) -> tuple[int, list[AdapterState], dict[int, float]] | None:
    """Return (round, adapters, loss by task cluster) of the newest usable checkpoint, if any.

    One of another clustering, or one that does not read, is passed over.
    """
    for path in sorted(directory.glob("round-*"), reverse=True):
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            files = sorted(path.glob("cluster-*.safetensors"), key=lambda f: int(f.stem.split("-")[1]))
            if state["clustering"] == digest:
                losses = {int(c["cluster"]): float(c["loss"]) for c in state["clusters"]}
                return int(path.name.split("-")[1]), [load_file(file) for file in files], losses
        except (OSError, ValueError, KeyError, SafetensorError):
            continue
    return None


def clustering_digest(space: RoutingSpace, assignments: Sequence[Assignment]) -> str:
    """Return a hash that tells whether a checkpoint belongs to this clustering."""
    digest = hashlib.sha256(space.centroids.tobytes() + space.transform.tobytes())
    for assignment in assignments:
        digest.update(
            repr([(assignment.client, s.cluster, s.num_examples) for s in assignment.subsets]).encode()
        )
    return digest.hexdigest()[:16]
