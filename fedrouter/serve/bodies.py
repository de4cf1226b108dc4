"""What a request's body asks to be routed: from OpenAI JSON to the texts that are embedded. Pure."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedrouter.embed import routing_text
from fedrouter.types import Turn

VIRTUAL_NAME = "fedrouter"  # the model name that asks for routing
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class Refusal(Exception):  # noqa: N818 - an answer, not a failure
    """A request that is answered here with an error, in OpenAI's shape."""

    headers: Sequence[tuple[bytes, bytes]] = ()  # beside those of any JSON answer

    def __init__(self, status: int, message: str, param: str | None = None, kind: str | None = None):
        super().__init__(message)
        self.status = status
        kind = kind or ("BadRequestError" if status < 500 else "InternalServerError")
        self.payload = {"error": {"message": message, "type": kind, "param": param, "code": status}}


def parse_routed(body: bytes) -> dict[str, Any] | None:
    """Return the body's JSON object if it names the virtual model, else None.

    Most other bodies are told apart without parsing; what is no JSON is not ours to refuse.
    """
    if VIRTUAL_NAME.encode() not in body and rb"\u" not in body:
        return None
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return payload if isinstance(payload, dict) and payload.get("model") == VIRTUAL_NAME else None


def routed_texts(
    path: str, payload: Mapping[str, Any], decode: Callable[[Sequence[int]], str]
) -> list[str] | None:
    """Return the text to embed for each prompt of a request ("" where there is none).

    None means that the server will refuse the body, so it goes there unchanged.

    Parameters
    ----------
    decode : token ids → text, for prompts given as tokens.

    Raises
    ------
    Refusal
        For ``prompt_embeds``: vectors of a prompt hold no text to route by.
    """
    if path == CHAT:
        turns = _turns(payload.get("messages"))
        return None if turns is None else [_embeddable(turns)]
    if payload.get("prompt_embeds") is not None:
        raise Refusal(
            400, f"prompt_embeds cannot be routed: name an adapter instead of {VIRTUAL_NAME}", "prompt_embeds"
        )
    prompts = _prompts(payload.get("prompt"), decode)
    return None if prompts is None else [_embeddable([Turn("user", prompt)]) for prompt in prompts]


def _embeddable(turns: Sequence[Turn]) -> str:
    # JSON may carry half a surrogate pair, which no tokenizer takes and which would fail its whole batch.
    return routing_text(turns).encode("utf-8", "replace").decode()


def _turns(messages: Any) -> list[Turn] | None:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return None
    return [Turn(str(message.get("role")), _content(message.get("content"))) for message in messages]


def _content(content: Any) -> str:
    """Join the text parts of a message's content as vLLM does; images and tool payloads hold none."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in parts
    ]
    return "\n".join(text for text in texts if isinstance(text, str))


def _prompts(prompt: Any, decode: Callable[[Sequence[int]], str]) -> list[str] | None:
    """One string a prompt; the API takes a string, a list of strings, token ids, or lists of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        return None
    if all(isinstance(one, str) for one in prompt):
        return prompt
    tokens = prompt if all(isinstance(one, list) for one in prompt) else [prompt]
    if not all(type(token) is int for ids in tokens for token in ids):
        return None
    try:
        return [decode(ids) for ids in tokens]
    except OverflowError:  # no vocabulary holds such an id
        return None
