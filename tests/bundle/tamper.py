"""Bundles changed by an attacker who also recomputes hashes, names and checksum."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedrouter.bundle.manifest import adapter_name, checksum

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read(root: Path) -> dict[str, Any]:
    return dict(json.loads((root / "manifest.json").read_text()))


def write(root: Path, manifest: dict[str, Any], seal: bool = True) -> None:
    """Write a manifest, with the right checksum if one can be computed."""
    if seal:
        manifest = {**manifest, "checksum": checksum(manifest)}
    (root / "manifest.json").write_text(json.dumps(manifest))


def edit(root: Path, *where: str | int, to: Any) -> None:
    """Set the value at ``where`` in the manifest."""
    manifest: Any = read(root)
    place = manifest
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = to
    write(root, manifest)


def first_adapter(root: Path) -> Path:
    name: str = read(root)["clusters"][0]["adapter"]
    return root / "adapters" / name


def reseal(root: Path) -> None:
    """Recompute hashes and adapters' names from the content, as far as it exists."""
    manifest = read(root)
    files = {name: _sha256(root / name, old) for name, old in manifest["files"].items()}
    holders = [(cluster, "adapter", cluster["name"]) for cluster in manifest["clusters"]]
    if manifest["generalist"]:
        holders.append((manifest, "generalist", "generalist"))
    for holder, key, head in holders:
        old = holder[key]
        hashes = [files.pop(f"adapters/{old}/{file}") for file in (CONFIG, WEIGHTS)]
        holder[key] = new = adapter_name(head, *hashes)
        (root / "adapters" / old).rename(root / "adapters" / new)
        files |= {f"adapters/{new}/{file}": one for file, one in zip((CONFIG, WEIGHTS), hashes, strict=True)}
    write(root, {**manifest, "files": files})


def rewrite(file: Path, change: Callable[[Any], Any]) -> None:
    """Apply ``change`` to the value of a JSON file."""
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def safetensors(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """Return a safetensors file with the given dtypes and shapes, right or wrong."""
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data


def _sha256(file: Path, old: str) -> str:
    try:
        small = file.is_file() and file.stat().st_size < 1 << 24
    except OSError:  # a link to itself
        small = False
    return hashlib.sha256(file.read_bytes()).hexdigest() if small else old
