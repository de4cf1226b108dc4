"""The directory that training writes and serving reads: plain PEFT adapters plus a router.

    bundle/
      manifest.json        what is in here, what it belongs to, and hashes of every other file that is used
      manifest.sig         only when signed: Ed25519, over manifest.json
      router.safetensors   mean, transform, centroids, probe vectors
      adapters/NAME/       adapter_config.json + adapter_model.safetensors, as PEFT writes them;
                           one a task cluster and, optionally, the generalist
      chat_template.jinja  only when the base has none of its own
      probes.jsonl         only where some were given: conversations and where each must go
      README.md            model card

A bundle is immutable once written, and untrusted input when read: ``load_bundle`` alone decides whether it is
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
