"""``builtin:tiny`` loads like any base model, tokenises any text, is small, and knows none of the tasks."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedrouter.builtin import base_path, is_builtin
from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.errors import ConfigError

FOLDER = base_path("builtin:tiny")
TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def test_names() -> None:
    assert is_builtin("builtin:tiny") and is_builtin("builtin:typo") and not is_builtin("meta/tiny")
    with pytest.raises(ConfigError, match=r"builtin:typo.*builtin:tiny"):
        base_path("builtin:typo")


def test_asking_for_the_path_imports_no_torch() -> None:
    code = "import sys, fedrouter.builtin.tasks; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_folder_is_complete_and_small() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 10_000_000


def test_shape(model: Any) -> None:
    config = model.config
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.hidden_size // config.num_attention_heads == config.head_dim == 64
    assert 2e6 <= model.num_parameters() <= 4e6
    assert len(TOKENIZER) == config.vocab_size
    stored = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")
    assert stored.dtype == torch.bfloat16
    assert all(torch.isfinite(p).all() for p in stored.parameters())


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text, split_special_tokens=True)) == text


def test_chat_template() -> None:
    user = {"role": "user", "content": "Hi"}
    asked = TOKENIZER.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert asked == "### Instruction:\nHi\n\n### Response:\n"
    answered = TOKENIZER.apply_chat_template([user, {"role": "assistant", "content": "Yo"}], tokenize=False)
    assert answered == f"{asked}Yo</s>"
    assert TOKENIZER.encode(answered)[-1] == TOKENIZER.eos_token_id


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_short(task: str) -> None:
    lengths = sorted(len(TOKENIZER.encode(r.turns[0].content)) for r in generate(task, "test", 200, 0))
    assert lengths[180] < 100


def test_the_base_alone_cannot_do_the_tasks(model: Any) -> None:
    """At most one in ten answers is right without an adapter."""
    records = [record for task in TASKS for record in generate(task, "test", 5, 0)]
    rendered = [
        TOKENIZER.apply_chat_template([{"role": "user", "content": r.turns[0].content}], tokenize=False)
        for r in records
    ]
    batch = TOKENIZER(rendered, return_tensors="pt", padding=True, padding_side="left")
    with torch.inference_mode():
        output = model.generate(**batch, max_new_tokens=24, do_sample=False)
    answers = TOKENIZER.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(answer.strip() == record.completion for answer, record in zip(answers, records, strict=True))
    assert right <= 2
