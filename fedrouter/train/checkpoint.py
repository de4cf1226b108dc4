"""What an interrupted run resumes from: one directory a round, written atomically, the last few kept."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedrouter.train.server import Best, RunState
from fedrouter.types import AdapterState, Assignment, RoutingSpace


def save_checkpoint(directory: Path, state: RunState, digest: str, keep: int) -> None:
    """Write a run's state under a temporary name, rename, and keep only the last ``keep`` rounds."""
    final = directory / f"round-{state.number - 1:05d}"
    partial = directory / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for k, (adapter, moments) in enumerate(zip(state.adapters, state.moments, strict=True)):
        save_file(dict(adapter), partial / f"cluster-{k}.safetensors")
        if moments:
            save_file(dict(moments), partial / f"moments-{k}.safetensors")
        if best := state.best[k]:
            save_file(dict(best.adapter), partial / f"best-{k}.safetensors")
    record = {
        "clustering": digest,
        "losses": state.losses,
        "best": [best and {"round": best.round, "loss": best.loss} for best in state.best],
    }
    (partial / "state.json").write_text(json.dumps(record), encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in sorted(directory.glob("round-*"))[:-keep]:
        shutil.rmtree(old)


def latest_checkpoint(directory: Path, digest: str) -> RunState | None:
    """Return the state of the newest usable checkpoint, if any.

    One of another clustering, or one that does not read, is passed over.
    """
    for path in sorted(directory.glob("round-*"), reverse=True):
        try:
            saved = json.loads((path / "state.json").read_text(encoding="utf-8"))
            if saved["clustering"] != digest:
                continue
            losses = tuple(saved["losses"])
            return RunState(
                number=int(path.name.split("-")[1]) + 1,
                adapters=tuple(load_file(path / f"cluster-{k}.safetensors") for k in range(len(losses))),
                moments=tuple(_load_if_there(path / f"moments-{k}.safetensors") for k in range(len(losses))),
                losses=losses,
                best=tuple(
                    best and Best(best["round"], best["loss"], load_file(path / f"best-{k}.safetensors"))
                    for k, best in enumerate(saved["best"])
                ),
            )
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


def _load_if_there(file: Path) -> AdapterState:
    return load_file(file) if file.exists() else {}
