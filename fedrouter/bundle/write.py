"""Atomic writing of a bundle, which is validated before it becomes visible."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from fedrouter.bundle.load import Bundle, load_bundle
from fedrouter.bundle.manifest import (
    CHAT_TEMPLATE,
    CONFIG,
    GENERALIST,
    MANIFEST,
    ROUTER,
    WEIGHTS,
    adapter_name,
    json_bytes,
    manifest_bytes,
)
from fedrouter.bundle.map import flat_map
from fedrouter.bundle.probes import PROBES
from fedrouter.errors import BundleError
from fedrouter.files import partial_directory
from fedrouter.types import AdapterState, Array, BaseSpec, EmbedderSpec, Guarantee, RoutingSpace, TaskCluster


def write_bundle(
    path: Path,
    *,
    base: BaseSpec,
    embedder: EmbedderSpec,
    clusters: Sequence[TaskCluster],
    adapters: Sequence[AdapterState],
    adapter_config: Mapping[str, Any],
    space: RoutingSpace,
    probe_vectors: Array,
    fallback: str,
    versions: Mapping[str, str],
    chat_template: str | None = None,
    generalist: AdapterState | None = None,
    guarantees: Sequence[Guarantee] = (),
    probes: bytes | None = None,
) -> Bundle:
    """Write a bundle under a temporary name, validate it, and rename it to ``path``.

    Parameters
    ----------
    clusters : task clusters; their field ``adapter`` is replaced by the name with content hash.
    adapters : one state per task cluster, in the same order.
    adapter_config : content of ``adapter_config.json``, as PEFT writes it.
    generalist : an adapter for prompts beyond every radius, usually the mean of ``adapters``.
    probes : content of ``probes.jsonl``.

    Raises
    ------
    BundleError
        If ``path`` exists already, or the written bundle is invalid, for example has a non-finite weight.
    """
    if path.exists():
        raise BundleError(
            f"{path} exists already and bundles are never overwritten; choose another directory"
        )
    partial = partial_directory(path)
    files: dict[str, str] = {}
    config = json_bytes(adapter_config)
    named = [
        replace(cluster, adapter=_write_adapter(partial, cluster.name, config, state, files))
        for cluster, state in zip(clusters, adapters, strict=True)
    ]
    general = _write_adapter(partial, GENERALIST, config, generalist, files) if generalist else None
    router = save(
        {
            "mean": space.mean,
            "transform": space.transform,
            "centroids": space.centroids,
            "cluster_of": np.asarray(space.cluster_of, dtype=np.int64),
            "probe": probe_vectors,
            "map": flat_map(space.centroids),
        }
    )
    files[ROUTER] = _write(partial / ROUTER, router)
    if chat_template is not None:
        files[CHAT_TEMPLATE] = _write(partial / CHAT_TEMPLATE, chat_template.encode())
    if probes is not None:
        files[PROBES] = _write(partial / PROBES, probes)
    manifest = manifest_bytes(
        base,
        embedder,
        named,
        guarantees,
        rank=int(adapter_config["r"]),
        fallback=fallback,
        generalist=general,
        files=files,
        versions=dict(versions),
    )
    _write(partial / MANIFEST, manifest)
    _write(partial / "README.md", _model_card(base, embedder, named, general, guarantees).encode())
    bundle = load_bundle(partial)
    partial.rename(path)
    return replace(bundle, path=path)


def _write(file: Path, content: bytes) -> str:
    """Write a file; return the SHA-256 of its content."""
    file.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def _write_adapter(root: Path, head: str, config: bytes, state: AdapterState, files: dict[str, str]) -> str:
    """Write one PEFT directory, put its hashes into ``files``, and return its name."""
    weights = save({tensor: state[tensor] for tensor in sorted(state)}, metadata={"format": "pt"})
    contents = {CONFIG: config, WEIGHTS: weights}
    name = adapter_name(head, *(hashlib.sha256(content).hexdigest() for content in contents.values()))
    directory = Path("adapters") / name
    (root / directory).mkdir(parents=True)
    files |= {
        f"{directory}/{file}": _write(root / directory / file, content) for file, content in contents.items()
    }
    return name


def _model_card(
    base: BaseSpec,
    embedder: EmbedderSpec,
    clusters: Sequence[TaskCluster],
    generalist: str | None,
    guarantees: Sequence[Guarantee],
) -> str:
    rows = "\n".join(f"| {c.name} | `{c.adapter}` | {c.num_examples} | {len(c.clients)} |" for c in clusters)
    if generalist:
        rows += f"\n| (generalist) | `{generalist}` | | |"
    promises = "".join(f"Differential privacy: {guarantee}.\n\n" for guarantee in guarantees)
    return (
        f"---\nlibrary_name: peft\nbase_model: {base.model}\ntags: [lora, federated-learning]\n---\n"
        f"# FedRouter bundle\n\nOne LoRA adapter per task cluster on `{base.model}`, trained across clients "
        f"that shared no data; prompts are routed by `{embedder.model}` ({embedder.kind}).\n\n"
        "| task cluster | adapter | training rows | clients |\n|---|---|---|---|\n"
        f"{rows}\n\n{promises}Serve: `fedrouter serve .` One adapter alone: "
        f'`PeftModel.from_pretrained(base, "adapters/NAME")`.\n'
    )
