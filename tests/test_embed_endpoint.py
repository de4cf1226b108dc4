"""An embeddings endpoint as embedder, with a small server over HTTP."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embeddings_server import DIM, MODEL, EmbeddingsServer, running
from fakes import space, write

from fedrouter import embed_endpoint
from fedrouter.bundle import check_embedder, find_embedder
from fedrouter.config import EMBEDDER_KEY
from fedrouter.embed import embedder_spec, load_embedder, probe
from fedrouter.embed_endpoint import EndpointEmbedder
from fedrouter.errors import BundleError, ConfigError, EndpointError
from fedrouter.types import BaseSpec, EmbedderSpec

BASE = BaseSpec("fake", None, "0" * 32)


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EMBEDDER_KEY, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "not for this server")


@pytest.fixture
def server() -> Iterator[EmbeddingsServer]:
    with running() as started:
        yield started


def spec_of(server: EmbeddingsServer, model: str = MODEL, max_tokens: int = 16) -> EmbedderSpec:
    return embedder_spec("endpoint", model, max_tokens, "float32", url=server.url)


def embedder_of(server: EmbeddingsServer, **changes: Any) -> EndpointEmbedder:
    return EndpointEmbedder(replace(spec_of(server), **changes), server.url)


def test_one_vector_a_text_in_their_order_however_many(server: EmbeddingsServer) -> None:
    embedder = embedder_of(server)
    texts = [f"w{number} again" for number in range(150)]
    texts[70], some = " ", [0, 63, 64, 70, 149]
    server.inputs.clear()
    together = embedder.embed(texts)
    assert [len(batch) for batch in server.inputs] == [64, 64, 21]
    assert together.shape == (150, DIM)
    assert together.dtype == np.float32
    alone = np.concatenate([embedder.embed([texts[row]]) for row in some])
    np.testing.assert_array_equal(together[some], alone)
    assert not together[70].any()
    assert embedder.embed([]).shape == (0, DIM)


def test_what_a_bundle_records(server: EmbeddingsServer) -> None:
    server.models["other"] = 0
    spec = spec_of(server)
    assert (spec.kind, spec.model, spec.dim, spec.max_tokens) == ("endpoint", MODEL, DIM, 16)
    assert spec == embedder_spec("endpoint", MODEL, 16, "float32", url=f"{server.url}/v1/")
    others = [spec_of(server, "other"), spec_of(server, max_tokens=17)]
    assert len({spec.fingerprint, *(other.fingerprint for other in others)}) == 3
    assert server.url not in repr(spec)


@pytest.mark.parametrize("knows_cut", [True, False])
def test_long_texts_are_cut_by_the_endpoint(server: EmbeddingsServer, knows_cut: bool) -> None:
    server.knows_cut = knows_cut
    embedder = embedder_of(server)
    [vector] = embedder.embed(["word " * 20])
    assert vector.sum() == (16 if knows_cut else 20)
    embedder.embed(["word " * 10_000])
    assert len(server.inputs[-1][0]) == 16 * 8, "not all of it is sent"


def test_more_tokens_than_the_endpoint_takes_are_refused(server: EmbeddingsServer) -> None:
    server.max_tokens = 15
    with pytest.raises(EndpointError, match="greater than max_model_len"):
        spec_of(server)


def test_a_key_comes_from_the_environment_and_appears_nowhere(
    server: EmbeddingsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "sesame"
    with pytest.raises(EndpointError, match="401") as refused:
        spec_of(server)
    assert "not for this server" not in str(refused.value)
    monkeypatch.setenv(EMBEDDER_KEY, "sesame-2")
    with pytest.raises(EndpointError, match="401") as refused:
        spec_of(server)
    assert "sesame-2" not in str(refused.value)
    monkeypatch.setenv(EMBEDDER_KEY, "sesame")
    assert probe(embedder_of(server)).shape == (3, DIM)


def test_what_fails_for_a_moment_is_asked_again(server: EmbeddingsServer) -> None:
    server.statuses = [503, 429]
    assert embedder_of(server).embed(["hello"]).sum() == 1
    hurried = embedder_of(server)
    hurried.hurry(1.0)
    server.statuses = [503]
    with pytest.raises(EndpointError, match="503"):
        hurried.embed(["hello"])


def test_an_endpoint_that_hangs_is_given_up(server: EmbeddingsServer) -> None:
    embedder = embedder_of(server)
    embedder.hurry(0.1)
    server.gate.clear()
    with pytest.raises(EndpointError, match=f"{MODEL} at {server.url}: .*timed out"):
        embedder.embed(["hello"])
    server.gate.set()


def answer_with(**changes: Any) -> Any:
    return lambda answer: {**answer, **changes}


def first(**changes: Any) -> Any:
    return lambda answer: {**answer, "data": [{**answer["data"][0], **changes}, *answer["data"][1:]]}


@pytest.mark.parametrize(
    "broken",
    [
        answer_with(data=[]),
        answer_with(data=None),
        lambda answer: {**answer, "data": answer["data"][:1]},
        lambda answer: b"<html>welcome</html>",
        lambda answer: b'{"data": [',
        lambda answer: [],
        first(embedding=[1.0]),
        first(embedding="%%%"),
        first(embedding=None),
        first(embedding=[math.nan] * DIM),
        first(index=None),
    ],
)
def test_an_answer_that_is_none_is_refused(
    server: EmbeddingsServer, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed_endpoint, "RETRIES", 0)
    embedder = embedder_of(server)
    server.broken = broken
    with pytest.raises(EndpointError, match=f"embedder {MODEL} at {server.url}: ") as refused:
        embedder.embed(["one", "two"])
    assert "\n" not in str(refused.value)


def test_an_unknown_model_or_none_listening(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed_endpoint, "RETRIES", 0)
    with running() as server:
        with pytest.raises(EndpointError, match="does not exist"):
            spec_of(server, "no-such-model")
        embedder = embedder_of(server)
    with pytest.raises(EndpointError, match="refused"):
        embedder.embed(["hello"])


def test_another_dimension_is_refused(server: EmbeddingsServer) -> None:
    with pytest.raises(EndpointError, match=f"{DIM} dimensions, not 8"):
        embedder_of(server, dim=8).embed(["hello"])


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://localhost", "http://ann:secret@localhost", "http://h/v1?key=secret", "http://"],
)
def test_an_address_that_is_none_or_holds_a_secret_is_refused(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        EndpointEmbedder(EmbedderSpec("endpoint", MODEL, 0, 16, "float32", DIM, ""), url)
    assert "secret" not in str(refused.value)


def test_an_address_belongs_to_an_endpoint_and_to_nothing_else(server: EmbeddingsServer) -> None:
    spec = spec_of(server)
    assert isinstance(load_embedder(spec, BASE, url=server.url), EndpointEmbedder)
    with pytest.raises(ConfigError, match="--embedder-url"):
        load_embedder(spec, BASE)
    with pytest.raises(ConfigError, match="not an endpoint"):
        load_embedder(replace(spec, kind="base"), BASE, url=server.url)


def test_another_model_of_that_name_is_refused_by_what_it_computes(
    server: EmbeddingsServer, tmp_path: Path
) -> None:
    spec = spec_of(server)
    embedder = load_embedder(spec, BASE, url=server.url)
    bundle = write(
        tmp_path / "bundle",
        space(np.eye(2, DIM, dtype=np.float32)),
        [1.0, 1.0],
        embedder=spec,
        probe_vectors=probe(embedder),
    )
    assert bundle.embedder == spec
    find_embedder(bundle, tmp_path, server.url)
    server.models[MODEL] = 1
    with pytest.raises(BundleError, match="not the one used in training: vectors of the probe texts differ"):
        check_embedder(bundle, embedder)
    assert server.url.encode() not in (bundle.path / "manifest.json").read_bytes()
