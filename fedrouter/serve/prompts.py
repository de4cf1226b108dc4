"""From the JSON of four APIs to the texts to embed. Pure."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedrouter.embed import user_texts
from fedrouter.serve.asgi import Refusal
from fedrouter.serve.paths import COMPLETIONS, RESPONSES, VIRTUAL_NAME
from fedrouter.types import Turn

# Type of a message part that holds text → key of its text, as in vLLM's renderers/chat_utils.py.
TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
Payload = Mapping[str, Any]


def model_of(payload: Payload) -> str:
    """Return the model that a body names; without a name it is the virtual model.

    Raises
    ------
    Refusal
        If the name is no string.
    """
    model = payload.get("model")
    if model is None or model == "":
        return VIRTUAL_NAME
    if not isinstance(model, str):
        raise Refusal(400, "model must be a string", "model")
    return model


def conversations(path: str, payload: Payload, decode: Callable[[Sequence[int]], str]) -> list[list[str]]:
    """Return, for each prompt of a request, the texts of its user turns in order.

    System prompts, images, tool calls and tool results are ignored.

    Parameters
    ----------
    path : one of ``ROUTED``.
    decode : token ids → text, for prompts given as tokens.

    Raises
    ------
    Refusal
        400 for a payload that does not follow the API, even if vLLM would accept it; and for
        ``prompt_embeds``, which hold no text to route by.
    """
    if payload.get("prompt_embeds") is not None:
        raise _embeds()
    if path == COMPLETIONS:
        return [_texts([Turn("user", prompt)]) for prompt in _prompts(payload.get("prompt"), decode)]
    field = "input" if path == RESPONSES else "messages"
    messages = payload.get(field)
    if path == RESPONSES and isinstance(messages, str):
        return [_texts([Turn("user", messages)])]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise Refusal(400, f"{field} must be a list of objects", field)
    turns = [Turn(str(message.get("role")), _content(message.get("content"), field)) for message in messages]
    return [_texts(turns)]


def _texts(turns: Sequence[Turn]) -> list[str]:
    # JSON may hold half a surrogate pair: no tokenizer accepts it, and the whole batch would fail.
    return [text.encode("utf-8", "replace").decode() for text in user_texts(turns)]


def _content(content: Any, field: str) -> str:
    """Join the text parts of a message's content as vLLM does; images and tool payloads have no text."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise Refusal(400, "a message's content must be a string or a list of parts", field)
    return "\n".join(text for part in content if (text := _part(part, field)) is not None)


def _part(part: Any, field: str) -> str | None:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise Refusal(400, "a part of a message's content must be a string or an object with a type", field)
    if kind == "prompt_embeds":
        raise _embeds()
    text = part.get(TEXT_PARTS[kind]) if kind in TEXT_PARTS else None
    if not isinstance(text, str | None):
        raise Refusal(400, f"the text of a part of type {kind} must be a string", field)
    return text


def _embeds() -> Refusal:
    return Refusal(
        400, f"prompt_embeds cannot be routed: name an adapter instead of {VIRTUAL_NAME}", "prompt_embeds"
    )


def _prompts(prompt: Any, decode: Callable[[Sequence[int]], str]) -> list[str]:
    """Return one string per prompt; stricter than vLLM, which accepts ``[true]`` as token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, str) for item in prompt):
            return prompt
        tokens = prompt if all(isinstance(item, list) for item in prompt) else [prompt]
        if all(type(token) is int and token >= 0 for ids in tokens for token in ids):
            try:
                return [decode(ids) for ids in tokens]
            except OverflowError:
                raise Refusal(400, "a token id is too large for any vocabulary", "prompt") from None
    raise Refusal(
        400, "prompt must be a string, a list of strings, token ids (integers), or lists of these", "prompt"
    )
