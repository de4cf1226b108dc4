from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from fakes import LetterEmbedder

from fedrouter.train.disk.cache import CachedEmbedder
from fedrouter.types import Array

TEXTS = ["abc", "ab", "", "hhh"]


class Counting(LetterEmbedder):
    """Counts the lists it embeds, except the probe; ``shift`` stands for other weights."""

    def __init__(self, shift: float = 0.0):
        self.shift, self.calls = np.float32(shift), -1

    def embed(self, texts: Sequence[str]) -> Array:
        self.calls += 1
        return super().embed(texts) + self.shift


def test_cached_embeddings_are_read(tmp_path: Path) -> None:
    first, second = Counting(), Counting()
    found = CachedEmbedder(first, tmp_path).embed(TEXTS)
    again = CachedEmbedder(second, tmp_path).embed(TEXTS)
    assert (first.calls, second.calls) == (1, 0)
    np.testing.assert_array_equal(found, first.embed(TEXTS))
    assert found.tobytes() == again.tobytes()
    assert again.dtype == np.float32


def test_changed_texts_order_or_weights_are_recomputed(tmp_path: Path) -> None:
    embedder = Counting()
    cached = CachedEmbedder(embedder, tmp_path)
    for texts in (TEXTS, TEXTS[::-1], TEXTS[:3], ["abca", "b", "", "hhh"]):
        np.testing.assert_array_equal(cached.embed(texts), LetterEmbedder().embed(texts))
    assert embedder.calls == 4
    other = Counting(shift=1.0)
    np.testing.assert_array_equal(
        CachedEmbedder(other, tmp_path).embed(TEXTS), LetterEmbedder().embed(TEXTS) + 1
    )
    assert other.calls == 1


@pytest.mark.parametrize("where", [0, 5, -1])
def test_a_damaged_file_is_recomputed(where: int, tmp_path: Path) -> None:
    found = CachedEmbedder(Counting(), tmp_path).embed(TEXTS)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[where] ^= 255
    for content in (bytes(damaged), whole[:40], b""):
        file.write_bytes(content)
        embedder = Counting()
        np.testing.assert_array_equal(CachedEmbedder(embedder, tmp_path).embed(TEXTS), found)
        assert embedder.calls == 1
        assert file.read_bytes() == whole, "the file is rewritten"


def test_no_texts(tmp_path: Path) -> None:
    assert CachedEmbedder(Counting(), tmp_path).embed([]).shape == (0, 8)
