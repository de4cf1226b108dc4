"""Training one adapter of a very small model: the effect of the options."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from fedrouter.builtin import base_path
from fedrouter.config import LoraSettings, TrainSettings
from fedrouter.data import builtin_records
from fedrouter.errors import ModelError
from fedrouter.models import load_tokenizer
from fedrouter.train.client.sft import IGNORED, AdapterTrainer
from fedrouter.train.client.targets import check_targets
from fedrouter.train.federation import Trained
from fedrouter.train.lora import cut, distance
from fedrouter.types import AdapterState, Record, Turn

RECORDS = builtin_records("builtin:four-tasks", "train", 2, 0)
Train = Callable[..., tuple[AdapterState, Trained]]


def small_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    tokenizer = load_tokenizer(base_path("builtin:tiny"), None)
    small = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(small), tokenizer


@pytest.fixture(scope="module")
def train() -> Train:
    def run(steps: int = 3, freeze_a: bool = False, **settings: object) -> tuple[AdapterState, Trained]:
        """Return the adapter before training, and the result of training."""
        trainer = AdapterTrainer(
            *small_model(),
            LoraSettings(rank=2, freeze_a=freeze_a),
            TrainSettings(batch_size=4, **settings),
            seed=0,
        )
        fresh = trainer.state()
        return fresh, trainer.train(fresh, trainer.tokenise(RECORDS), steps, 1e-2, seed=0)

    return run


def test_the_proximal_term_acts_from_the_second_step_on(train: Train) -> None:
    (start, plain), (_, pulled) = train(), train(proximal=100.0)
    assert distance(start, pulled.adapter) < 0.9 * distance(start, plain.adapter)
    assert pulled.loss < 2 * plain.loss, "the reported loss omits the proximal term"
    (_, one), (_, one_pulled) = train(steps=1), train(steps=1, proximal=100.0)
    for name, array in one.adapter.items():
        np.testing.assert_array_equal(array, one_pulled.adapter[name])


@given(mu=st.sampled_from([0.0, 0.3]) | st.floats(1, 100), seed=st.integers(0, 1000))
@settings(max_examples=12)
def test_training_with_the_proximal_term_descends_the_dense_objective(mu: float, seed: int) -> None:
    """Oracle: loss + μ/2 ‖w - w₀‖² of a model with dense weights W + α/r BA, without PEFT, TRL or hooks."""
    trainer = AdapterTrainer(
        *small_model(), LoraSettings(rank=2, alpha=6), TrainSettings(batch_size=3, proximal=mu), seed=0
    )
    rng = np.random.default_rng(seed)
    sent = {
        n: x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for n, x in sorted(trainer.state().items())
    }
    rows = trainer.tokenise(RECORDS[:3])  # a single batch, so order does not matter
    found = trainer.train(sent, rows, steps=3, learning_rate=1e-2, seed=0).adapter

    model = small_model()[0].requires_grad_(False)
    weights = {n: torch.tensor(x, requires_grad=True) for n, x in sent.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2, weight_decay=0)
    for _ in range(3):
        dense: dict[str, torch.Tensor] = dict(model.named_parameters())
        for name in weights:
            if ".lora_A." in name:
                module = name.removeprefix("base_model.model.").replace(".lora_A", "")
                dense[module] = dense[module] + 3 * weights[name.replace("lora_A", "lora_B")] @ weights[name]
        losses = []
        for row in rows:
            out = torch.func.functional_call(model, dense, (torch.tensor(row["input_ids"])[None],))
            wanted = torch.tensor(row["labels"][1:])
            losses.append(cross_entropy(out.logits[0, :-1], wanted, ignore_index=IGNORED, reduction="none"))
        num_tokens = sum(label != IGNORED for row in rows for label in row["labels"])
        pull = sum(((w - torch.tensor(sent[n])) ** 2).sum() for n, w in weights.items())
        optimizer.zero_grad()
        (torch.cat(losses).sum() / num_tokens + mu / 2 * pull).backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)  # as the Trainer does
        optimizer.step()
    for name, weight in weights.items():
        assert np.abs(found[name] - sent[name]).max() > 1e-3
        np.testing.assert_allclose(found[name], weight.detach().numpy(), atol=2e-4, err_msg=name)


def test_gradient_checkpointing_recomputes_with_equal_results_and_is_undone() -> None:
    found, passes = [], []
    for checkpointing in (False, True):
        model, tokenizer = small_model()
        settings = TrainSettings(batch_size=4, gradient_checkpointing=checkpointing)
        trainer = AdapterTrainer(model, tokenizer, LoraSettings(rank=2), settings, seed=0)
        rows, start = trainer.tokenise(RECORDS), trainer.state()
        passes.append(0)
        counting = model.model.layers[0].mlp.register_forward_pre_hook(
            lambda *_: passes.append(passes.pop() + 1)
        )
        found += [trainer.train(start, rows, 3, 1e-2, seed=0).adapter for _ in range(2)]
        assert not model.get_input_embeddings()._forward_hooks
        assert not model.is_gradient_checkpointing
        counting.remove()
    assert passes == [6, 12]
    for other in found[1:]:
        for name, array in found[0].items():
            np.testing.assert_allclose(other[name], array, atol=1e-6)


def test_validation_loss_is_the_mean_over_completion_tokens() -> None:
    trainer = AdapterTrainer(*small_model(), LoraSettings(rank=2), TrainSettings(batch_size=3), seed=0)
    rows = trainer.tokenise(RECORDS)
    found, num_tokens = trainer.loss(trainer.state(), rows)
    model = small_model()[0]
    losses = []
    for row in rows:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        with torch.no_grad():
            likely = model(ids[None]).logits[0, :-1].log_softmax(-1)
        losses += [-float(likely[i, label]) for i, label in enumerate(labels[1:]) if label != IGNORED]
    assert num_tokens == len(losses)
    assert found == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_frozen_a_does_not_change_while_b_learns(train: Train) -> None:
    for frozen in (True, False):
        start, trained = train(freeze_a=frozen)
        for name, array in trained.adapter.items():
            moved = not np.array_equal(array, start[name])
            assert moved == (".lora_B." in name or not frozen), name


def test_a_lower_rank_equals_a_trainer_of_that_rank_at_the_same_scale() -> None:
    high, low = (
        AdapterTrainer(*small_model(), LoraSettings(rank=r, alpha=4 * r), TrainSettings(batch_size=4), seed=0)
        for r in (3, 2)
    )
    start = cut(high.state(), 2)
    found, want = (t.train(start, t.tokenise(RECORDS), 3, 1e-2, seed=0).adapter for t in (high, low))
    for name, array in want.items():
        assert found[name].shape == array.shape
        np.testing.assert_allclose(found[name], array, atol=1e-5)
        assert ".lora_A." in name or np.abs(array).max() > 1e-3, "the adapter has changed"


@pytest.mark.parametrize("frozen", [True, False])
def test_the_trained_tensors_are_listed(frozen: bool) -> None:
    trainer = AdapterTrainer(*small_model(), LoraSettings(freeze_a=frozen), TrainSettings(), seed=0)
    assert trainer.trained == [n for n in sorted(trainer.state()) if ".lora_B." in n or not frozen]


def test_a_missing_target_module_is_named_even_next_to_a_valid_one() -> None:
    model, _ = small_model()
    check_targets(model, "all-linear")
    check_targets(model, ["q_proj", "mlp.up_proj", "model.layers.0.self_attn.v_proj"])
    with pytest.raises(ModelError, match=r"no module q_porj; its linear modules are down_proj, .*q_proj"):
        check_targets(model, ["v_proj", "q_porj"])


def test_accumulated_batches_equal_one_large_batch() -> None:
    found = []
    for size, times in ((8, 1), (2, 4)):
        settings = TrainSettings(batch_size=size, gradient_accumulation=times)
        trainer = AdapterTrainer(*small_model(), LoraSettings(rank=2), settings, seed=0)
        assert trainer.batch_size == 8
        trained = trainer.train(trainer.state(), trainer.tokenise(RECORDS), 3, 1e-2, seed=0)
        found.append(trained)
    assert found[0].num_examples == found[1].num_examples
    for name, array in found[0].adapter.items():
        np.testing.assert_allclose(found[1].adapter[name], array, atol=2e-5, err_msg=name)


def test_rows_of_a_step_are_sorted_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [Record((Turn("user", "word " * (1 + 7 * i % 23)),), "yes") for i in range(16)]
    settings = TrainSettings(batch_size=2, gradient_accumulation=4)
    trainer = AdapterTrainer(*small_model(), LoraSettings(rank=2), settings, seed=0)
    inner, widths = trainer.model.get_base_model().model, []
    forward = inner.forward

    def counting(*args: object, **given: Any) -> Any:
        widths.append(given["input_ids"].shape[1])
        return forward(*args, **given)

    monkeypatch.setattr(inner, "forward", counting)
    trainer.train(trainer.state(), trainer.tokenise(texts), 2, 1e-2, seed=0)
    lengths = sorted(len(row.ids) for row in trainer.tokeniser.rows(texts))
    steps = widths[:4], widths[4:]
    assert all(step == sorted(step) for step in steps)
    assert max(max(step) for step in steps) == lengths[-1]
    assert 2 * sum(widths) < 1.2 * sum(lengths), "random order would pad by about half"


def test_a_rehearsal_restores_the_model_and_reports_failures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = AdapterTrainer(*small_model(), LoraSettings(rank=2), TrainSettings(batch_size=4), seed=0)
    before = trainer.state()
    trainer.rehearse(RECORDS, 1e-2)
    for name, array in trainer.state().items():
        np.testing.assert_array_equal(array, before[name])

    def fail(*_: object, **__: object) -> None:
        raise IndexError("index out of range in self")

    monkeypatch.setattr(trainer, "train", fail)
    with pytest.raises(
        ModelError, match="one training step on the longest rows failed: IndexError: index out"
    ):
        trainer.rehearse(RECORDS, 1e-2)
