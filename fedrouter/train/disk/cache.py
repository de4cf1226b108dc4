"""A cache of embeddings on disk, exact to the byte."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fedrouter.embed import Embedder, probe
from fedrouter.files import write_atomically
from fedrouter.types import Array


class CachedEmbedder:
    """An embedder that caches its vectors under ``directory``, one file for each list of texts.

    A file holds a whole list because a vector's last bits depend on the other texts of its batch: so a run
    gives the same bytes with a filled and with an empty cache. The file name is a hash of the embedder's
    specification, of its probe vectors (other weights give other vectors) and of the texts. A damaged file
    is recomputed.
    """

    def __init__(self, embedder: Embedder, directory: Path):
        self.spec = embedder.spec
        self.probe: Array = probe(embedder)  # (3, d)
        self._embedder, self._directory = embedder, directory
        description = json.dumps(asdict(self.spec), sort_keys=True).encode()
        self._identity = hashlib.sha256(description + self.probe.tobytes()).digest()

    def embed(self, texts: Sequence[str]) -> Array:
        """Return one vector per text: (n, d) float32."""
        key = hashlib.sha256(self._identity)
        for text in texts:
            key.update(hashlib.sha256(text.encode()).digest())
        file = self._directory / f"{key.hexdigest()[:32]}.safetensors"
        vectors = _read(file, (len(texts), self.spec.dim))
        if vectors is None:
            vectors = self._embedder.embed(texts)
            _write(file, vectors)
        return vectors


def _read(file: Path, shape: tuple[int, int]) -> Array | None:
    """Return a file's vectors, or None if the file is missing or damaged."""
    try:
        found = load_file(file)
        vectors, digest = found["vectors"], found["sha256"]
    except (OSError, KeyError, SafetensorError):
        return None
    intact = digest.tobytes() == hashlib.sha256(vectors.tobytes()).digest()
    return vectors if intact and vectors.shape == shape and vectors.dtype == np.float32 else None


def _write(file: Path, vectors: Array) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    digest = np.frombuffer(hashlib.sha256(vectors.tobytes()).digest(), dtype=np.uint8)
    write_atomically(file, save({"vectors": vectors, "sha256": digest}))
