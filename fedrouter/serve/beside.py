"""A bundle beside the served one: what both must have in common, and how vLLM's processes learn of it."""

import json
import os
from dataclasses import replace
from pathlib import Path

from fedrouter.bundle import CHAT_TEMPLATE, Bundle
from fedrouter.errors import BundleError

VARIABLE = "FEDROUTER_SECOND"


def to_env(path: Path, share: float) -> dict[str, str]:
    """Return the environment that tells another process of a second bundle, and the share it answers."""
    return {VARIABLE: json.dumps([str(path.resolve()), share])}


def from_env() -> tuple[Path, float] | None:
    """Read it from this process's environment."""
    if not os.environ.get(VARIABLE):
        return None
    path, share = json.loads(os.environ[VARIABLE])
    return Path(path), share


def check_alike(old: Bundle, bundle: Bundle) -> None:
    """Refuse a bundle that cannot stand beside another one on a server.

    Raises
    ------
    BundleError
        If base, embedder or chat template differ, or an adapter of the same name does.
    """
    path = bundle.path
    if bundle.base.fingerprint != old.base.fingerprint:
        raise BundleError(
            f"{path.name} belongs to base model {bundle.base.model}, another than the one served"
        )
    mine, theirs = (replace(one.embedder, model="") for one in (old, bundle))
    if mine != theirs:
        raise BundleError(
            f"{path.name} belongs to embedder {bundle.embedder.model}, another than the one in use"
        )
    if bundle.files.get(CHAT_TEMPLATE) != old.files.get(CHAT_TEMPLATE):
        raise BundleError(f"{path.name} has another chat template, which only a restart can change")
    for file, digest in bundle.files.items():  # eight hex digits in a name can be made to agree
        if file.startswith("adapters/") and old.files.get(file, digest) != digest:
            raise BundleError(f"{path.name}: {file} is another than the one served under that name")
