"""One adapter trained on a very small model: what the options do to it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from fedrouter.builtin import base_path
from fedrouter.config import LoraSettings, TrainSettings
from fedrouter.data import builtin_records
from fedrouter.models import load_tokenizer
from fedrouter.train.aggregate import distance
from fedrouter.train.sft import IGNORED, AdapterTrainer, Trained
from fedrouter.types import AdapterState

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
        """Return the adapter before training, and what training gave."""
        trainer = AdapterTrainer(
            *small_model(),
            LoraSettings(rank=2, freeze_a=freeze_a),
            TrainSettings(batch_size=4, **settings),  # type: ignore[arg-type]
            seed=0,
        )
        fresh = trainer.state()
        return fresh, trainer.train(fresh, trainer.tokenise(RECORDS), steps, 1e-2, seed=0)

    return run


def test_the_proximal_term_pulls_back_from_the_second_step_on(train: Train) -> None:
    (start, plain), (_, pulled) = train(), train(proximal=100.0)
    assert distance(start, pulled.adapter) < 0.9 * distance(start, plain.adapter)
    assert pulled.loss < 2 * plain.loss, "the loss is shown without the term"
    (_, one), (_, one_pulled) = train(steps=1), train(steps=1, proximal=100.0)
    for name, array in one.adapter.items():
        np.testing.assert_array_equal(array, one_pulled.adapter[name])


def test_validation_loss_is_the_mean_over_completion_tokens_however_batched() -> None:
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


def test_a_frozen_a_stays_as_it_was_drawn_and_b_learns(train: Train) -> None:
    for frozen in (True, False):
        start, trained = train(freeze_a=frozen)
        for name, array in trained.adapter.items():
            moved = not np.array_equal(array, start[name])
            assert moved == (".lora_B." in name or not frozen), name


@pytest.mark.parametrize("frozen", [True, False])
def test_noise_goes_to_the_tensors_that_are_trained(frozen: bool) -> None:
    trainer = AdapterTrainer(*small_model(), LoraSettings(freeze_a=frozen), TrainSettings(), seed=0)
    assert trainer.trained == [n for n in sorted(trainer.state()) if ".lora_B." in n or not frozen]
