"""The directory that training writes and serving reads: plain PEFT adapters plus a router.

    bundle/
      manifest.json        contents, base and embedder, and hashes of the other files except README.md
      manifest.sig         only if signed: Ed25519 signature of manifest.json
      router.safetensors   mean, transform, centroids, probe vectors
      adapters/NAME/       adapter_config.json + adapter_model.safetensors, as PEFT writes them;
                           one per task cluster and, optionally, the generalist
      chat_template.jinja  only if it replaces the base's template
      probes.jsonl         only if given: conversations and their expected task clusters
      README.md            model card

A bundle is immutable once written, and untrusted input when read: only ``load_bundle`` decides whether it is
used. The format is described in docs/bundle-format.md.
"""

from fedrouter.bundle.adapter import check_modules, read_adapter, read_weights
from fedrouter.bundle.load import (
    Bundle,
    check_base,
    check_embedder,
    find_base,
    find_embedder,
    load_bundle,
)
from fedrouter.bundle.manifest import (
    CHAT_TEMPLATE,
    CONFIG,
    FALLBACKS,
    GENERALIST,
    MANIFEST,
    SCHEMA_VERSION,
    WEIGHTS,
)
from fedrouter.bundle.map import flat_map
from fedrouter.bundle.probes import PROBES, parse_probes, read_probes
from fedrouter.bundle.sign import SIGNATURE, sign_bundle
from fedrouter.bundle.write import write_bundle

__all__ = [
    "CHAT_TEMPLATE",
    "CONFIG",
    "FALLBACKS",
    "GENERALIST",
    "MANIFEST",
    "PROBES",
    "SCHEMA_VERSION",
    "SIGNATURE",
    "WEIGHTS",
    "Bundle",
    "check_base",
    "check_embedder",
    "check_modules",
    "find_base",
    "find_embedder",
    "flat_map",
    "load_bundle",
    "parse_probes",
    "read_adapter",
    "read_probes",
    "read_weights",
    "sign_bundle",
    "write_bundle",
]
