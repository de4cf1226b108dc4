"""The directory that training writes and serving reads: plain PEFT adapters plus a router.

    bundle/
      manifest.json        what is in here and what it belongs to
      router.safetensors   mean, transform, centroids, radii, probe vectors
      adapters/NAME/       adapter_config.json + adapter_model.safetensors, as PEFT writes them;
                           one a task cluster and, optionally, the generalist
      chat_template.jinja  only when the base has none of its own
      README.md            model card

A bundle is immutable once written; adapter names end in a hash of their content. Loading refuses what would
fail silently later. The format is described in docs/bundle-format.md.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from fedrouter.embed import Embedder, load_embedder, probe
from fedrouter.errors import BundleError
from fedrouter.models import base_fingerprint, resolve_base
from fedrouter.types import AdapterState, Array, BaseSpec, EmbedderSpec, Guarantee, RoutingSpace, TaskCluster

SCHEMA_VERSION = 1
PROBE_TOLERANCE = 0.02  # relative; other CPUs, batch sizes and bfloat16 stay below, other weights far above
FALLBACKS = ("base", "nearest", "generalist", "reject")
GENERALIST = "generalist"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A validated bundle on disk, without its adapters' weights."""

    path: Path
    base: BaseSpec
    embedder: EmbedderSpec
    clusters: tuple[TaskCluster, ...]
    space: RoutingSpace
    probe: Array  # (3, d): the embedder's vectors of the probe texts
    rank: int
    fallback: str  # what answers beyond the radius: one of FALLBACKS
    generalist: str | None  # name of the adapter for prompts of no task cluster, if there is one
    versions: Mapping[str, str]
    guarantees: tuple[Guarantee, ...] = ()  # of the noise that its training added; empty without

    def adapter_path(self, cluster: TaskCluster) -> Path:
        """Return the PEFT directory of a task cluster's adapter."""
        return self.path / "adapters" / cluster.adapter

    @property
    def adapter_paths(self) -> dict[str, Path]:
        """The PEFT directory of every adapter by its name, the generalist's last."""
        names = [cluster.adapter for cluster in self.clusters]
        return {n: self.path / "adapters" / n for n in [*names, *filter(None, [self.generalist])]}

    @property
    def chat_template(self) -> Path | None:
        """The chat template to serve with, when the base has none of its own."""
        path = self.path / "chat_template.jinja"
        return path if path.is_file() else None


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
) -> Bundle:
    """Write a bundle atomically: under a temporary name, validated, then renamed.

    Parameters
    ----------
    clusters : their ``adapter`` is filled in here: name and content hash.
    adapters : one state a cluster, in the same order.
    adapter_config : what ``adapter_config.json`` holds, as PEFT writes it.
    generalist : an adapter for prompts of no task cluster: as a rule the mean of ``adapters``.

    Raises
    ------
    BundleError
        If ``path`` exists already, or what was written does not validate (a non-finite weight, say).
    """
    if path.exists():
        raise BundleError(f"{path} exists already; a bundle is never overwritten, choose another directory")
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config_bytes = _json_bytes(adapter_config)
    named = [
        replace(cluster, adapter=_write_adapter(partial / "adapters", cluster.name, config_bytes, state))
        for cluster, state in zip(clusters, adapters, strict=True)
    ]
    general = generalist and _write_adapter(partial / "adapters", GENERALIST, config_bytes, generalist)
    router = save(
        {
            "mean": space.mean,
            "transform": space.transform,
            "centroids": space.centroids,
            "cluster_of": np.asarray(space.cluster_of, dtype=np.int64),
            "probe": probe_vectors,
        }
    )
    (partial / "router.safetensors").write_bytes(router)
    if chat_template is not None:
        (partial / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "base": asdict(base),
        "embedder": asdict(embedder),
        "rank": int(adapter_config["r"]),
        "fallback": fallback,
        "generalist": general or None,
        "router_sha256": hashlib.sha256(router).hexdigest(),
        "clusters": [asdict(cluster) for cluster in named],
        "versions": dict(versions),
        **({"privacy": [asdict(guarantee) for guarantee in guarantees]} if guarantees else {}),
    }
    (partial / "manifest.json").write_bytes(_json_bytes(manifest))
    card = _model_card(base, embedder, named, general or None, guarantees)
    (partial / "README.md").write_text(card, encoding="utf-8")
    bundle = load_bundle(partial)
    partial.rename(path)
    return replace(bundle, path=path)


def load_bundle(path: Path) -> Bundle:
    """Load and validate a bundle: everything that can be checked without a model.

    Raises
    ------
    BundleError
        For a missing or damaged file, an unknown schema version, a weight that is not finite, adapters whose
        names, shapes or rank do not fit, or a router that does not fit the clusters.
    """
    manifest = _read_manifest(path)
    try:
        bundle = Bundle(
            path=path,
            base=BaseSpec(**manifest["base"]),
            embedder=EmbedderSpec(**manifest["embedder"]),
            clusters=tuple(
                TaskCluster(**{**cluster, "clients": tuple(cluster["clients"])})
                for cluster in manifest["clusters"]
            ),
            **_read_router(path, manifest["router_sha256"]),
            rank=int(manifest["rank"]),
            fallback=manifest["fallback"],
            generalist=manifest.get("generalist"),  # bundles of before have none
            versions=manifest["versions"],
            guarantees=tuple(Guarantee(**guarantee) for guarantee in manifest.get("privacy", ())),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path / 'manifest.json'}: missing or unknown field {error}") from error
    _check_router(bundle)
    shapes = None
    for name, directory in bundle.adapter_paths.items():
        found = _check_adapter(directory, name, bundle.rank)
        if shapes is not None and found != shapes:
            raise BundleError(f"{directory}: its tensors differ in name or shape from the others'")
        shapes = found
    return bundle


def find_base(bundle: Bundle, base: str | None = None) -> Path:
    """Return the checked directory of a bundle's base model.

    Parameters
    ----------
    base : a directory or hub id, when not what the bundle says.

    Raises
    ------
    ModelError, BundleError
        If there is no such model, or it is not the one that the adapters were trained on.
    """
    path = resolve_base(base or bundle.base.model, None if base else bundle.base.revision)
    check_base(bundle, path)
    return path


def find_embedder(bundle: Bundle, base_path: Path, url: str | None = None) -> Embedder:
    """Load and check a bundle's embedder; the slowest of all checks.

    Parameters
    ----------
    url : where it is, if it is an endpoint.

    Raises
    ------
    ConfigError, ModelError, BundleError
        If it does not load, or does not compute what the bundle's embedder computed.
    """
    embedder = load_embedder(bundle.embedder, bundle.base, base_path, url)
    check_embedder(bundle, embedder)
    return embedder


def check_base(bundle: Bundle, base_path: Path) -> None:
    """Refuse a base model that is not the one the adapters were trained on.

    Raises
    ------
    BundleError
        If config or tokenizer differ, or an adapter addresses a module that the base has not.
    """
    if base_fingerprint(base_path) != bundle.base.fingerprint:
        raise BundleError(
            f"{bundle.path}: its adapters were trained on base {bundle.base.model}, and {base_path} is "
            "another model (config or tokenizer differ); pass the right one with --base"
        )
    modules = _base_modules(base_path)
    adapter = bundle.adapter_path(bundle.clusters[0]) / "adapter_model.safetensors"
    for name, array in load_file(adapter).items() if modules else ():
        module, kind = name.removeprefix("base_model.model.").rsplit(".lora_", 1)
        shape = modules.get(module)
        axis = 1 if kind.startswith("A") else 0
        if shape is None or (len(shape) == 2 and array.shape[axis] != shape[axis]):
            raise BundleError(
                f"{adapter}: tensor {name} {array.shape} does not fit the base model in {base_path}"
            )


def check_embedder(bundle: Bundle, embedder: Embedder) -> None:
    """Refuse an embedder that does not compute what the bundle's embedder computed.

    Raises
    ------
    BundleError
        If its vectors of the probe texts differ from the recorded ones.
    """
    found = probe(embedder)
    if found.shape == bundle.probe.shape:
        error = float(np.linalg.norm(found - bundle.probe) / np.linalg.norm(bundle.probe))
        if error <= PROBE_TOLERANCE:
            return
        detail = f"vectors of the probe texts differ by {error:.1%}"
    else:
        detail = f"vectors have {found.shape[1]} dimensions, not {bundle.probe.shape[1]}"
    raise BundleError(
        f"{bundle.path}: this embedder ({embedder.spec.model}) is not the one of training: {detail}; "
        "serve with the same weights or train again"
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleError(f"{path} is not a bundle: no manifest.json in it") from error
    except (OSError, ValueError) as error:
        raise BundleError(f"{file}: not readable as JSON: {error}") from error
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{file}: schema version {version} is unknown here (this fedrouter reads {SCHEMA_VERSION}); "
            "use the fedrouter release that wrote it"
        )
    return dict(manifest)


def _read_router(path: Path, digest: str) -> dict[str, Any]:
    file = path / "router.safetensors"
    tensors = _load_tensors(file)
    if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
        raise BundleError(f"{file}: content differs from what the manifest records; copy the bundle again")
    try:
        space = RoutingSpace(
            mean=tensors["mean"],
            transform=tensors["transform"],
            centroids=tensors["centroids"],
            cluster_of=tuple(int(k) for k in tensors["cluster_of"]),
        )
        return {"space": space, "probe": tensors["probe"]}
    except KeyError as error:
        raise BundleError(f"{file}: no tensor {error}") from error


def _check_router(bundle: Bundle) -> None:
    space, where = bundle.space, bundle.path / "router.safetensors"
    dim, width = space.transform.shape
    fits = (
        space.mean.shape == (dim,) == (bundle.embedder.dim,)
        and space.centroids.shape == (len(space.cluster_of), width)
        and set(space.cluster_of) == set(range(len(bundle.clusters)))
        and bundle.probe.shape[1:] == (dim,)
    )
    if not fits:
        raise BundleError(f"{where}: shapes do not fit the manifest's embedder and task clusters")
    for name in ("mean", "transform", "centroids"):
        if not np.isfinite(getattr(space, name)).all():
            raise BundleError(f"{where}: {name} holds values that are not finite")
    if bundle.fallback not in FALLBACKS:
        raise BundleError(
            f"{bundle.path / 'manifest.json'}: fallback {bundle.fallback!r} is none of {FALLBACKS}"
        )
    if bundle.fallback == GENERALIST and bundle.generalist is None:
        raise BundleError(
            f"{bundle.path / 'manifest.json'}: fallback generalist, but it names no generalist adapter; "
            "choose another fallback, or train again"
        )


def _write_adapter(directory: Path, name: str, config: bytes, state: AdapterState) -> str:
    """Write one PEFT directory; return its name: ``name`` and a hash of the content."""
    weights = save({tensor: state[tensor] for tensor in sorted(state)}, metadata={"format": "pt"})
    named = f"{name}-{_content_hash(config, weights)}"
    (directory / named).mkdir(parents=True)
    (directory / named / "adapter_config.json").write_bytes(config)
    (directory / named / "adapter_model.safetensors").write_bytes(weights)
    return named


def _check_adapter(path: Path, name: str, rank: int) -> dict[str, tuple[int, ...]]:
    """Validate one PEFT directory; return its tensors' shapes."""
    weights_file, config_file = path / "adapter_model.safetensors", path / "adapter_config.json"
    tensors = _load_tensors(weights_file)
    try:
        config_bytes = config_file.read_bytes()
        config = json.loads(config_bytes)
    except (OSError, ValueError) as error:
        raise BundleError(f"{config_file}: missing or not JSON ({error}); copy the bundle again") from error
    if config.get("r") != rank:
        raise BundleError(f"{config_file}: rank {config.get('r')}, but the manifest says {rank}")
    for tensor, array in tensors.items():
        if not np.isfinite(array).all():
            raise BundleError(f"{weights_file}: tensor {tensor} holds values that are not finite")
        side = 0 if ".lora_A." in tensor else 1 if ".lora_B." in tensor else None
        if side is None or array.ndim != 2 or array.shape[side] != rank:
            raise BundleError(
                f"{weights_file}: tensor {tensor} {array.shape} is no LoRA factor of rank {rank}"
            )
        if (
            tensor.replace(".lora_A.", ".lora_B.") not in tensors
            or tensor.replace(".lora_B.", ".lora_A.") not in tensors
        ):
            raise BundleError(f"{weights_file}: tensor {tensor} has no counterpart")
    if not tensors:
        raise BundleError(f"{weights_file}: holds no tensors")
    if not name.endswith(_content_hash(config_bytes, weights_file.read_bytes())):
        raise BundleError(f"{path}: content differs from the hash in its name; copy the bundle again")
    return {tensor: array.shape for tensor, array in tensors.items()}


def _load_tensors(file: Path) -> dict[str, Any]:
    try:
        return dict(load_file(file))
    except FileNotFoundError as error:
        raise BundleError(f"{file}: no such file; copy the bundle again") from error
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{file}: damaged ({error}); copy the bundle again") from error


def _base_modules(base_path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a base model's weights by module name; empty when it has no safetensors to look into."""
    shapes = {}
    for file in sorted(base_path.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as handle:
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                shapes[name.removesuffix(".weight")] = tuple(handle.get_slice(name).get_shape())
    return shapes


def _content_hash(config: bytes, weights: bytes) -> str:
    return hashlib.sha256(config + b"\0" + weights).hexdigest()[:8]


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


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
