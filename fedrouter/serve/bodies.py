"""What a request's body asks to be routed: from the JSON of four APIs to texts to embed. Pure."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedrouter.embed import user_texts
from fedrouter.types import Turn

VIRTUAL_NAME = "fedrouter"  # the model name that asks for routing
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
ROUTED = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)
# No adapter changes what these compute: they answer as for the base.
AS_BASE = (
    "/tokenize",
    "/detokenize",
    f"{MESSAGES}/count_tokens",
    *(f"{path}/render" for path in ROUTED),
    f"{CHAT}/derender",
    f"{COMPLETIONS}/derender",
)
# These generate, and the virtual name would silently mean the base there.
UNROUTED = (f"{CHAT}/batch", "/inference/v1/generate", "/cohere/v2/chat", "/v1/systemone", "/invocations")

ERROR_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    409: "ConflictError",
    413: "RequestEntityTooLargeError",
    415: "UnsupportedMediaTypeError",
    422: "UnprocessableEntityError",
    503: "ServiceUnavailableError",
}


class Refusal(Exception):  # noqa: N818 - an answer, not a failure
    """A request that is answered here with an error, in OpenAI's shape.

    Parameters
    ----------
    code : the status by default.
    retry_s : seconds after which the client may try again, where that makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_s: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.headers = [] if retry_s is None else [(b"retry-after", str(retry_s).encode())]
        kind = ERROR_TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
        self.payload = {"error": {"message": message, "type": kind, "param": param, "code": code or status}}


def parse_routed(body: bytes) -> dict[str, Any] | None:
    """Return the body's JSON object if it names the virtual model, else None.

    Most other bodies are told apart without parsing; what is no JSON is not ours to refuse.

    Raises
    ------
    Refusal
        For a body nested too deep to be read, which vLLM would call its own failure (500).
    """
    if VIRTUAL_NAME.encode() not in body and rb"\u" not in body:
        return None
    payload = parse(body)
    return payload if payload is not None and payload.get("model") == VIRTUAL_NAME else None


def parse(body: bytes) -> dict[str, Any] | None:
    """Return the body's JSON object, read as vLLM reads it: of two equal keys the last one counts.

    Raises
    ------
    Refusal
        For a body nested too deep to be read.
    """
    try:
        payload = json.loads(body)
    except RecursionError:
        raise Refusal(400, "the body is nested too deep") from None
    except ValueError:
        return None
    return payload if isinstance(payload, dict) else None


def conversations(
    path: str, payload: Mapping[str, Any], decode: Callable[[Sequence[int]], str]
) -> list[list[str]] | None:
    """Return, for each prompt of a request, the texts of its user turns in their order.

    Text counts; system prompts, images, tool calls and tool results do not. None means that the server will
    refuse the body, so it goes there unchanged.

    Parameters
    ----------
    path : one of ``ROUTED``.
    decode : token ids → text, for prompts given as tokens.

    Raises
    ------
    Refusal
        For ``prompt_embeds``: vectors of a prompt hold no text to route by.
    """
    if _embeds(payload):
        raise Refusal(
            400, f"prompt_embeds cannot be routed: name an adapter instead of {VIRTUAL_NAME}", "prompt_embeds"
        )
    if path == COMPLETIONS:
        prompts = _prompts(payload.get("prompt"), decode)
        return None if prompts is None else [_texts([Turn("user", prompt)]) for prompt in prompts]
    messages = payload.get("input") if path == RESPONSES else payload.get("messages")
    if path == RESPONSES and isinstance(messages, str):
        return [_texts([Turn("user", messages)])]
    turns = _turns(messages)
    return None if turns is None else [_texts(turns)]


def _texts(turns: Sequence[Turn]) -> list[str]:
    # JSON may carry half a surrogate pair, which no tokenizer takes and which would fail its whole batch.
    return [text.encode("utf-8", "replace").decode() for text in user_texts(turns)]


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
        part.get("text") if isinstance(part, dict) and part.get("type") in ("text", "input_text") else part
        for part in parts
    ]
    return "\n".join(text for text in texts if isinstance(text, str))


def _embeds(payload: Mapping[str, Any]) -> bool:
    if payload.get("prompt_embeds") is not None:
        return True
    messages = payload.get("messages")
    contents = (
        [m.get("content") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    )
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, dict) and part.get("type") == "prompt_embeds" for part in parts)


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
