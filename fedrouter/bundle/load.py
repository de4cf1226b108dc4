"""Directory → validated bundle; checks of its base model and its embedder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedrouter.bundle.adapter import Adapter, check_modules, read_adapter
from fedrouter.bundle.files import MIB, check_links, opened, read
from fedrouter.bundle.manifest import CHAT_TEMPLATE, ROUTER, Manifest, read_manifest
from fedrouter.bundle.probes import MAX_BYTES, PROBES, parse_probes
from fedrouter.bundle.sign import check_signature
from fedrouter.bundle.tensors import read_header, read_tensors
from fedrouter.embed import Embedder, find_model, load_embedder, probe
from fedrouter.errors import BundleError, DataError
from fedrouter.models import base_fingerprint, read_json, resolve_base
from fedrouter.types import Array, BaseSpec, EmbedderSpec, Guarantee, Probe, RoutingSpace, TaskCluster

PROBE_TOLERANCE = 0.02  # relative; other CPUs, batch sizes and bfloat16 stay below, other weights far above
MAX_ROUTER, MAX_TEMPLATE = 1024 * MIB, MIB
LARGEST = 1e8  # maximum of the router's values; far above any embedder's, and its square does not overflow
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")  # keys for the number of layers in models' configs


@dataclass(frozen=True, slots=True)
class Bundle:
    """A validated bundle on disk; the adapters' weights are not loaded."""

    path: Path
    base: BaseSpec
    embedder: EmbedderSpec
    clusters: tuple[TaskCluster, ...]
    space: RoutingSpace
    probe: Array  # (3, d): the embedder's vectors of the probe texts
    rank: int
    fallback: str  # one of FALLBACKS
    generalist: str | None  # name of the generalist adapter, if there is one
    versions: Mapping[str, str]
    guarantees: tuple[Guarantee, ...]  # differential privacy of its training; empty without noise
    files: Mapping[str, str]  # SHA-256 of each file that is used, by path; without the manifest
    shapes: Mapping[str, tuple[int, ...]]  # shapes of every adapter's tensors, by PEFT's names
    probes: tuple[Probe, ...] = ()

    def adapter_path(self, cluster: TaskCluster) -> Path:
        """Return the PEFT directory of a task cluster's adapter."""
        return self.path / "adapters" / cluster.adapter

    @property
    def adapter_paths(self) -> dict[str, Path]:
        """The PEFT directory of every adapter by name, the generalist's last."""
        names = [cluster.adapter for cluster in self.clusters]
        return {n: self.path / "adapters" / n for n in [*names, *filter(None, [self.generalist])]}

    @property
    def chat_template(self) -> Path | None:
        """The chat template that replaces the base's, if there is one."""
        return self.path / CHAT_TEMPLATE if CHAT_TEMPLATE in self.files else None


def load_bundle(path: Path, signed_by: Path | None = None) -> Bundle:
    """Load and validate a bundle: everything that can be checked without a model.

    No other code may read a bundle before this function has accepted it.

    Parameters
    ----------
    signed_by : public Ed25519 key (PEM) with which the bundle's signature must verify; None: not checked.

    Raises
    ------
    BundleError
        If a file is missing, damaged, invalid or outside ``path``, the manifest does not list the probes, or
        the signature does not verify.
    ConfigError
        If ``signed_by`` is not such a key.
    """
    manifest, content = read_manifest(path)
    check_links(path)
    if signed_by is not None:
        check_signature(path, content, signed_by)
    space, probe_vectors = _read_router(path, manifest)
    _check_template(path, manifest)
    first: Adapter | None = None
    for name in manifest.adapters:
        adapter = read_adapter(path, f"adapters/{name}", manifest.files)
        if adapter.rank != manifest.rank:
            raise BundleError(f"{adapter.path}: rank {adapter.rank}, but the manifest says {manifest.rank}")
        first = first or adapter
        if adapter.shapes != first.shapes:
            raise BundleError(f"{adapter.path}: its tensors differ in name or shape from other adapters'")
    assert first is not None, "a manifest has at least one task cluster"
    return Bundle(
        path=path,
        space=space,
        probe=probe_vectors,
        shapes=first.shapes,
        probes=_read_probes(path, manifest),
        **manifest.specs(),
    )


def find_base(bundle: Bundle, base: str | None = None) -> Path:
    """Return the checked directory of a bundle's base model.

    Parameters
    ----------
    base : a directory or hub id; default: the bundle's.

    Raises
    ------
    ModelError
        If there is no such model.
    BundleError
        If it is not the model that the adapters were trained on.
    """
    path = resolve_base(base or bundle.base.model, None if base else bundle.base.revision)
    check_base(bundle, path)
    return path


def find_embedder(bundle: Bundle, base_path: Path, url: str | None = None) -> Embedder:
    """Load and check a bundle's embedder; the slowest of all checks.

    Parameters
    ----------
    url : address of an embedder of kind endpoint.

    Raises
    ------
    ConfigError, ModelError
        If the embedder does not load.
    BundleError
        If its vectors of the probe texts differ from the recorded ones.
    """
    if bundle.embedder.kind == "encoder" and url is None:
        _check_layer(bundle, find_model(bundle.embedder, bundle.base, base_path))
    embedder = load_embedder(bundle.embedder, bundle.base, base_path, url)
    check_embedder(bundle, embedder)
    return embedder


def check_base(bundle: Bundle, base_path: Path) -> None:
    """Refuse a base model that is not the one the adapters were trained on.

    Raises
    ------
    BundleError
        If config or tokenizer differ, or the base lacks a module of the adapters or the embedder's layer.
    """
    if base_fingerprint(base_path) != bundle.base.fingerprint:
        raise BundleError(
            f"{bundle.path}: its adapters were trained on base {bundle.base.model}, but {base_path} is "
            "another model (config or tokenizer differ); pass the right one with --base"
        )
    if bundle.embedder.kind == "base":
        _check_layer(bundle, base_path)
    check_modules(Adapter(bundle.adapter_path(bundle.clusters[0]), bundle.rank, bundle.shapes), base_path)


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
        f"{bundle.path}: embedder {embedder.spec.model} is not the one used in training: {detail}; "
        "serve with the same weights or train again"
    )


def _read_router(root: Path, manifest: Manifest) -> tuple[RoutingSpace, Array]:
    path = root / ROUTER
    with opened(root, ROUTER, MAX_ROUTER, manifest.files[ROUTER]) as file:
        header = read_header(file, path)
        _check_shapes(path, {tensor.name: (tensor.dtype, tensor.shape) for tensor in header}, manifest)
        tensors = {tensor.name: array for tensor, array in read_tensors(file, path, header)}
    cluster_of = tuple(int(k) for k in tensors.pop("cluster_of"))
    if set(cluster_of) != set(range(len(manifest.clusters))):
        raise BundleError(f"{path}: cluster_of does not number the manifest's task clusters")
    for name, array in tensors.items():
        if np.abs(array).max() > LARGEST:
            raise BundleError(f"{path}: {name} has values above {LARGEST:g}, which no embedder computes")
    if not np.linalg.norm(tensors["probe"]):  # also if its square underflows
        raise BundleError(f"{path}: probe is zero, which no embedder computes")
    probe_vectors = tensors.pop("probe")
    space = RoutingSpace(**tensors, cluster_of=cluster_of)
    with np.errstate(over="ignore", invalid="ignore"):
        for z in (probe_vectors - space.mean) @ space.transform:
            if not np.isfinite(((space.centroids - z) ** 2).sum(axis=1)).all():
                raise BundleError(f"{path}: distances of the probe texts are not finite")
    return space, probe_vectors


def _check_shapes(path: Path, found: Mapping[str, tuple[str, tuple[int, ...]]], manifest: Manifest) -> None:
    """Refuse tensors with other names, dtypes or shapes than a router's, before any is read."""
    dim = manifest.embedder.dim
    width = found.get("transform", ("", ()))[1][-1:]
    num = found.get("cluster_of", ("", ()))[1]
    wanted = {
        "mean": ("F32", (dim,)),
        "transform": ("F32", (dim, *width)),
        "centroids": ("F32", (*num, *width)),
        "cluster_of": ("I64", num),
        "probe": ("F32", (3, dim)),
    }
    if "map" in found:  # older bundles have none
        wanted["map"] = ("F32", (*width, 2))
    if found != wanted or len(num) != 1 or width > (dim,):
        raise BundleError(
            f"{path}: names, dtypes or shapes do not fit the manifest's embedder and task clusters"
        )


def _check_template(root: Path, manifest: Manifest) -> None:
    if CHAT_TEMPLATE in manifest.files:
        content = read(root, CHAT_TEMPLATE, MAX_TEMPLATE, manifest.files[CHAT_TEMPLATE])
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BundleError(f"{root / CHAT_TEMPLATE}: not UTF-8; copy the bundle again") from error


def _read_probes(root: Path, manifest: Manifest) -> tuple[Probe, ...]:
    if PROBES not in manifest.files:
        if (root / PROBES).exists():  # whoever put it there expects that it is checked
            raise BundleError(
                f"{root / PROBES}: not part of the bundle, as the manifest does not list it; move it away "
                "(fedrouter probe BUNDLE FILE checks it there), or include it: train with routing.probes"
            )
        return ()
    try:
        return parse_probes(read(root, PROBES, MAX_BYTES, manifest.files[PROBES]), root / PROBES)
    except DataError as error:
        raise BundleError(str(error)) from error


def _check_layer(bundle: Bundle, model_path: Path) -> None:
    config = read_json(model_path / "config.json")
    text = config.get("text_config")
    places = (config, text if isinstance(text, dict) else {})
    layers = [place[key] for place in places for key in LAYERS if isinstance(place.get(key), int)]
    if layers and bundle.embedder.layer > layers[0]:
        raise BundleError(
            f"{bundle.path}: its embedder reads layer {bundle.embedder.layer}, but the model in {model_path} "
            f"has {layers[0]} layers; train again"
        )
