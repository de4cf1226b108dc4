"""Adapters trained in one batch learn what TRL would teach each alone."""

from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedrouter.builtin import base_path
from fedrouter.config import Config, LoraSettings, TrainSettings
from fedrouter.data import builtin_records
from fedrouter.models import load_tokenizer
from fedrouter.train.client.client import Client
from fedrouter.train.client.sft import AdapterTrainer
from fedrouter.train.local import LocalFederation
from fedrouter.train.side_by_side import Job, StackedFederation, StackedTrainer
from fedrouter.types import (
    AdapterState,
    Array,
    EmbedderSpec,
    Membership,
    RoutingSpace,
    TrainFailure,
    TrainReply,
    TrainRequest,
)

RECORDS = builtin_records("builtin:four-tasks", "train", 12, 0)
SETTINGS = TrainSettings(batch_size=4, weight_decay=0.01, validation=0.25)


T = TypeVar("T", bound=AdapterTrainer)


def trainer(kind: type[T], settings: TrainSettings = SETTINGS) -> T:
    tokenizer = load_tokenizer(base_path("builtin:tiny"), None)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    return kind(LlamaForCausalLM(shape), tokenizer, LoraSettings(rank=2), settings, seed=0)


def shifted(adapter: AdapterState, by: int) -> AdapterState:
    draw = np.random.default_rng(by)
    return {k: (a + 0.05 * draw.normal(size=a.shape)).astype(np.float32) for k, a in adapter.items()}


@pytest.mark.parametrize("tokens", [1, 10_000])  # one adapter per forward pass, or all
@pytest.mark.parametrize("proximal", [0.0, 0.5])
def test_each_adapter_learns_the_same_as_alone(tokens: int, proximal: float) -> None:
    settings = SETTINGS.model_copy(update={"proximal": proximal})
    alone, stacked = trainer(AdapterTrainer, settings), trainer(StackedTrainer, settings)
    stacked._tokens = tokens
    # With full batches of four, the different order of rows does not matter.
    jobs = [
        Job(shifted(alone.state(), i), alone.tokenise(RECORDS[4 * i : 4 * i + 4]), steps, 1e-2, i)
        for i, steps in enumerate((2, 5, 3))
    ]
    together = stacked.train_all(jobs)
    for job, found in zip(jobs, together, strict=True):
        want = alone.train(job.adapter, job.data, job.steps, job.learning_rate, job.seed)
        assert found.num_examples == want.num_examples
        assert found.loss == pytest.approx(want.loss, rel=1e-3)
        moved = {k: want.adapter[k] - job.adapter[k] for k in job.adapter}
        for name, change in moved.items():
            # Where a gradient is almost zero, the first steps of AdamW may have either sign.
            apart = np.abs(found.adapter[name] - want.adapter[name])
            assert (apart > 0.05 * np.abs(change).max()).mean() < 0.02, name


def test_losses_equal_those_of_single_adapters() -> None:
    alone, stacked = trainer(AdapterTrainer), trainer(StackedTrainer)
    jobs = [Job(shifted(alone.state(), i), alone.tokenise(RECORDS[i : 5 + 4 * i])) for i in range(3)]
    for job, (loss, num) in zip(jobs, stacked.losses(jobs), strict=True):
        want, num_wanted = alone.loss(job.adapter, job.data)
        assert loss == pytest.approx(want, rel=1e-5)
        assert num == num_wanted


def test_training_leaves_the_base_unchanged() -> None:
    stacked = trainer(StackedTrainer)
    ids = torch.arange(6)[None]
    before = stacked.model.get_base_model()(input_ids=ids).logits
    stacked.train_all([Job(stacked.state(), stacked.tokenise(RECORDS[:4]), 1, 1e-2, 0)])
    assert torch.equal(stacked.model.get_base_model()(input_ids=ids).logits, before)


class Zeros:
    spec = EmbedderSpec("base", "fake", 0, 8, "float32", 2, "")

    def embed(self, texts: Sequence[str]) -> Array:
        return np.zeros((len(texts), 2), dtype=np.float32)


def test_a_round_is_trained_in_one_batch_and_a_failure_is_a_reply() -> None:
    names = ["a", "b", "c"]
    clients = [Client(n, RECORDS[12 * i : 12 * i + 12], Zeros(), 0) for i, n in enumerate(names)]
    stacked = trainer(StackedTrainer)
    federation = StackedFederation(clients, stacked)
    zeros = np.zeros(2, dtype=np.float32)
    space = RoutingSpace(zeros, np.eye(2, dtype=np.float32), zeros[None], (0,))
    federation.assign(space, Membership(dict.fromkeys(names, (0,)), {}, 1))
    fresh = stacked.state()
    seen: list[int] = []
    whole = stacked.train_all

    def train_all(jobs: Sequence[Job]) -> Any:
        seen.append(len(jobs))
        return whole(jobs)

    stacked.train_all = train_all  # type: ignore[method-assign]
    requests = [TrainRequest(n, k, 0, fresh, 2, 1e-2) for n, k in (("a", 0), ("b", 7), ("c", 0))]
    answers = list(federation.train(requests))
    assert seen == [2]
    assert [type(a) for a in answers] == [TrainReply, TrainFailure, TrainReply]
    assert [a.client for a in answers] == names
    assert list(federation.train([])) == []
    (plain,) = LocalFederation(clients, stacked).train(requests[:1])
    first = answers[0]
    assert isinstance(first, TrainReply) and isinstance(plain, TrainReply)
    for name, array in first.adapter.items():
        np.testing.assert_allclose(array, plain.adapter[name], atol=1e-4)


def test_a_trainer_error_is_raised() -> None:
    clients = [Client("a", RECORDS[:12], Zeros(), 0), Client("b", RECORDS[12:24], Zeros(), 0)]
    stacked = trainer(StackedTrainer)
    federation = StackedFederation(clients, stacked)
    zeros = np.zeros(2, dtype=np.float32)
    federation.assign(
        RoutingSpace(zeros, np.eye(2, dtype=np.float32), zeros[None], (0,)),
        Membership({"a": (0,), "b": (0,)}, {}, 1),
    )

    def broken(jobs: Sequence[Job]) -> NoReturn:
        raise RuntimeError("no")

    stacked.train_all = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        list(federation.train([TrainRequest(n, 0, 0, stacked.state(), 1, 1e-2) for n in "ab"]))


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("train", {"gradient_checkpointing": True}),
        ("lora", {"freeze_a": True}),
        ("lora", {"ranks": {"a": 2}}),
    ],
)
def test_settings_that_need_trl_are_refused(section: str, values: dict[str, Any]) -> None:
    sections = {"train": {"stacked": True}}
    sections[section] = {**sections.get(section, {}), **values}
    with pytest.raises(ValueError, match=r"train\.stacked"):
        Config.model_validate(sections)
