"""The strict schema of ``manifest.json``, its reading and its writing."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from fedrouter.bundle.files import MIB, first_problem, read, shown
from fedrouter.bundle.probes import PROBES
from fedrouter.errors import BundleError
from fedrouter.types import MAX_LABEL, BaseSpec, EmbedderSpec, Guarantee, TaskCluster, is_label

SCHEMA_VERSION = 2
MANIFEST, ROUTER, CHAT_TEMPLATE = "manifest.json", "router.safetensors", "chat_template.jinja"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # an adapter's files
FALLBACKS = ("base", "nearest", "generalist", "reject")
GENERALIST = "generalist"
MAX_MANIFEST = 64 * MIB  # enough for thousands of clients in every task cluster
OUTDATED = (
    "prompts are now embedded differently; train again into another directory, or ask the bundle's owner to"
)


def _label(text: str) -> str:
    if not is_label(text):
        raise ValueError(f"expected printable text on one line, up to {MAX_LABEL} characters")
    return text


def _place(text: str) -> str:
    if not text.isprintable():
        raise ValueError("expected printable text on one line")
    return text


Name = Annotated[str, Field(pattern=r"^\w[\w.-]{0,63}$"), AfterValidator(_place)]
AdapterName = Annotated[str, Field(pattern=r"^\w[\w.-]{0,63}-[0-9a-f]{8}$"), AfterValidator(_place)]
Label = Annotated[str, AfterValidator(_label)]
Place = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_place)]  # a path, or an id
Fingerprint = Annotated[str, Field(pattern=r"^[\w-]{1,64}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=1 << 53)]
Rank = Annotated[int, Field(ge=1, le=4096)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class Base(_Strict):
    """The base model; see ``BaseSpec``."""

    model: Place
    revision: Label | None
    fingerprint: Fingerprint


class Embedder(_Strict):
    """The embedder; see ``EmbedderSpec``, whose fields these are."""

    kind: Literal["base", "encoder", "sentence-transformers", "endpoint"]
    model: Place
    layer: Annotated[int, Field(ge=0, le=1024)]  # load.py checks that the model has it
    max_tokens: Annotated[int, Field(ge=1, le=1 << 17)]
    dtype: Literal["float32", "float16", "bfloat16"]
    dim: Annotated[int, Field(ge=1, le=1 << 16)]
    fingerprint: Fingerprint
    pooling: Literal["unit", "mean"]


class Cluster(_Strict):
    """A task cluster; see ``TaskCluster``."""

    name: Name
    adapter: AdapterName
    num_examples: Count
    clients: tuple[Label, ...]
    task_counts: dict[Label, Count]
    radius: Annotated[float, Field(ge=0, le=1e12)]
    training: dict[Label, float]


class Privacy(_Strict):
    """A differential privacy guarantee; see ``Guarantee``."""

    unit: Literal["row", "client"]
    covers: Label
    num_releases: Count
    epsilon: Annotated[float, Field(ge=0)]
    delta: Annotated[float, Field(ge=0, le=1)]


class Manifest(_Strict):
    """The whole manifest."""

    schema_version: Literal[2]
    base: Base
    embedder: Embedder
    rank: Rank
    fallback: Literal["base", "nearest", "generalist", "reject"]
    generalist: AdapterName | None
    files: dict[str, Sha256]  # of every file that is used, by its path in the bundle
    clusters: Annotated[tuple[Cluster, ...], Field(min_length=1, max_length=4096)]
    versions: dict[Label, Label]
    privacy: tuple[Privacy, ...] = ()
    checksum: Sha256  # of all other fields; see ``checksum``

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters, in the order of the task clusters; the generalist's last."""
        return [c.adapter for c in self.clusters] + ([self.generalist] if self.generalist else [])

    @model_validator(mode="after")
    def _fits_together(self) -> "Manifest":
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        names = [GENERALIST, *(c.name for c in self.clusters)]
        if twice := _twice(names):
            yield f"clusters: name {twice} is used twice; {GENERALIST} is reserved"
        if twice := _twice(self.adapters):
            yield f"adapter {twice} is used twice"
        if self.fallback == GENERALIST and self.generalist is None:
            yield "fallback is generalist, but there is no generalist adapter; train again"
        for cluster in self.clusters:
            if twice := _twice(cluster.clients):
                yield f"client {twice} is listed twice in task cluster {cluster.name}"
        wanted = {
            ROUTER,
            *(f"adapters/{name}/{file}" for name in self.adapters for file in (CONFIG, WEIGHTS)),
        }
        unused = self.files.keys() - wanted - {CHAT_TEMPLATE, PROBES}
        if missing := sorted(wanted - self.files.keys()):
            yield f"files: {shown(missing[0])} is not listed"
        elif unused:
            yield f"files: {shown(min(unused))} is listed but not used"
        heads = [c.name for c in self.clusters] + [GENERALIST] * (self.generalist is not None)
        for head, name in zip(heads, self.adapters, strict=True):
            if name != adapter_name(head, *(self.files[f"adapters/{name}/{f}"] for f in (CONFIG, WEIGHTS))):
                yield f"adapter {name}: its name is not {head} and the hash of its content"

    def specs(self) -> dict[str, Any]:
        """Return the fields of ``Bundle`` that the manifest contains, by name."""
        return {
            "base": BaseSpec(**self.base.model_dump()),
            "embedder": EmbedderSpec(**self.embedder.model_dump()),
            "clusters": tuple(TaskCluster(**cluster.model_dump()) for cluster in self.clusters),
            "rank": self.rank,
            "fallback": self.fallback,
            "generalist": self.generalist,
            "versions": self.versions,
            "guarantees": tuple(Guarantee(**privacy.model_dump()) for privacy in self.privacy),
            "files": self.files,
        }


def adapter_name(head: str, config_sha256: str, weights_sha256: str) -> str:
    """Return an adapter's name: its task cluster's name and a hash of its two files."""
    return f"{head}-{hashlib.sha256(f'{config_sha256} {weights_sha256}'.encode()).hexdigest()[:8]}"


def read_manifest(root: Path) -> tuple[Manifest, bytes]:
    """Read a bundle's manifest; return it with its bytes, which a signature covers.

    Raises
    ------
    BundleError
        If the manifest is missing, has another schema version, or is invalid.
    """
    path = root / MANIFEST
    if not os.path.lexists(path):
        raise BundleError(f"{root} is not a bundle: it contains no {MANIFEST}")
    content = read(root, MANIFEST, MAX_MANIFEST)
    try:
        document = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise BundleError(f"{path}: not readable as JSON: {shown(str(error))}") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if type(version) is not int or version != SCHEMA_VERSION:  # true equals 1
        raise BundleError(f"{path}: {_version_problem(version)}")
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise BundleError(f"{path}: {first_problem(error)}") from error
    if manifest.checksum != checksum(document):
        raise BundleError(f"{path}: content differs from its checksum; copy the bundle again")
    return manifest, content


def manifest_bytes(
    base: BaseSpec,
    embedder: EmbedderSpec,
    clusters: Sequence[TaskCluster],
    guarantees: Sequence[Guarantee],
    **more: Any,
) -> bytes:
    """Return the content of ``manifest.json``; ``more`` are its other fields."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "base": asdict(base),
        "embedder": asdict(embedder),
        "clusters": [asdict(cluster) for cluster in clusters],
        **more,
        **({"privacy": [asdict(guarantee) for guarantee in guarantees]} if guarantees else {}),
    }
    return json_bytes({**document, "checksum": checksum(document)})


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Return JSON with sorted keys, so that equal values give equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def checksum(document: Mapping[str, Any]) -> str:
    """Return a hash of the manifest's other fields, which detects accidental changes but not attacks."""
    rest = {key: value for key, value in document.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _version_problem(version: object) -> str:
    if type(version) is int and version < SCHEMA_VERSION:
        return f"schema version {version}, but this fedrouter reads {SCHEMA_VERSION}: {OUTDATED}"
    return (
        f"schema version {shown(version)} is unknown (this fedrouter reads {SCHEMA_VERSION}); "
        "use the fedrouter release that wrote it"
    )


def _twice(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]
