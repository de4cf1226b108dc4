import json
import shutil
from datetime import date
from pathlib import Path

import pytest

from fedrouter.builtin import base_path
from fedrouter.errors import ConfigError, ModelError
from fedrouter.models import base_fingerprint, dated, load_tokenizer, render_prompt, resolve_base
from fedrouter.types import Turn


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_path("builtin:tiny"), tmp_path / "base"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_names_become_directories(copy: Path) -> None:
    assert resolve_base("builtin:tiny") == base_path("builtin:tiny")
    assert resolve_base(str(copy)) == copy
    with pytest.raises(ConfigError, match="builtin:tiny"):
        resolve_base("builtin:huge")
    with pytest.raises(ModelError, match="no such directory"):
        resolve_base("./nowhere/model")
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_base(str(copy))


def test_a_hub_id_that_is_not_cached_says_so_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="not cached") as caught:
        resolve_base("nobody/no-such-model")
    assert "\n" not in str(caught.value)


def test_fingerprint_knows_the_model_not_the_copy(copy: Path) -> None:
    original = base_fingerprint(base_path("builtin:tiny"))
    assert base_fingerprint(copy) == original
    edit(copy / "config.json", transformers_version="9.9", use_cache=False)
    assert base_fingerprint(copy) == original, "what changes nothing computed does not count"
    edit(copy / "config.json", num_hidden_layers=3)
    assert base_fingerprint(copy) != original
    shutil.copy(base_path("builtin:tiny") / "config.json", copy / "config.json")
    edit(copy / "tokenizer.json", version="2.0")
    assert base_fingerprint(copy) != original


def test_a_base_without_chat_template_is_refused_until_one_is_configured(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"no chat template: set base\.chat_template"):
        load_tokenizer(copy)
    prompt = render_prompt(load_tokenizer(copy, "alpaca"), (Turn("user", "Hello"),))
    assert prompt == "### Instruction:\nHello\n\n### Response:\n"
    (copy / "own.jinja").write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    assert render_prompt(load_tokenizer(copy, str(copy / "own.jinja")), (Turn("user", "x"),)) == "<x>"
    with pytest.raises(ConfigError, match="neither"):
        load_tokenizer(copy, "alpacca")


def test_the_vocabulary_never_changes_for_padding(copy: Path) -> None:
    edit(copy / "tokenizer_config.json", pad_token=None)
    tokenizer = load_tokenizer(copy)
    assert tokenizer.pad_token == tokenizer.eos_token
    assert len(tokenizer) == len(load_tokenizer(base_path("builtin:tiny")))


def test_a_tokenizer_without_an_end_token_is_refused_when_loaded(copy: Path) -> None:
    edit(copy / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ModelError, match="no end token"):
        load_tokenizer(copy)


def test_named_templates_take_the_default_one_or_are_refused(copy: Path) -> None:
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "x"}, {"name": "rag", "template": "x"}]
    edit(copy / "tokenizer_config.json", chat_template=named)
    with pytest.raises(ModelError, match="chat templates rag, tool_use but no default one"):
        load_tokenizer(copy)
    edit(copy / "tokenizer_config.json", chat_template=[*named, {"name": "default", "template": template}])
    assert load_tokenizer(copy).chat_template == template


def test_a_date_that_a_template_asks_for_is_fixed_and_said(copy: Path) -> None:
    own = "Today is {{ strftime_now(\"%d %b %Y\") }}. {% for m in messages %}{{ m['content'] }}{% endfor %}"
    (copy / "chat_template.jinja").write_text(own)
    said: list[str] = []
    tokenizer = load_tokenizer(copy, None, date(2026, 1, 2), said.append)
    assert render_prompt(tokenizer, (Turn("user", "x"),)) == "Today is 02 Jan 2026. x"
    assert said and "2026-01-02" in said[0] and "strftime_now" not in tokenizer.chat_template
    with pytest.raises(ModelError, match=r"strftime_now.* with something other than a string literal"):
        dated("{{ strftime_now(form) }}", date(2026, 1, 2))
