"""Refuse request fields on which vLLM fails or spends seconds.

For every item of ``input`` on /v1/responses vLLM tries some thirty types, and lists 236 errors if none fits:
5,000 such items, 100 KB, blocked the whole server for 37 s and took 2.3 GiB (vLLM 0.32). Items that clearly
fit a type are cheap; of others only a few are let through.
"""

from collections.abc import Callable, Mapping
from typing import Any

from fedrouter.serve.asgi import Refusal
from fedrouter.serve.paths import INVOCATIONS, RESPONSES

MAX_ODD = 64  # items of a list that do not clearly fit a type: refusing them takes vLLM half a second
MAX_ITEMS = 2_000  # items of ``input`` on /v1/responses: 0.15 ms each even if they fit
ROLES = ("user", "assistant", "system", "developer")
STATUSES = ("in_progress", "completed", "incomplete")


def check_shapes(path: str, payload: Mapping[str, Any]) -> None:
    """Raise ``Refusal`` (400) for a payload that would fail in vLLM or block it, whatever its model."""
    if not isinstance(payload.get("structured_outputs"), dict | None):  # vLLM calls its methods unchecked
        raise Refusal(400, "structured_outputs must be an object", "structured_outputs")
    _check_prompt_logprobs(payload)
    _check_list(payload, "messages", _is_chat_message)
    if path.startswith((RESPONSES, INVOCATIONS)):
        _check_list(payload, "input", _is_item)
        _check_list(payload, "tools", _is_function)


def _check_prompt_logprobs(payload: Mapping[str, Any]) -> None:
    """Refuse log-likelihoods of the prompt: with adapters, vLLM's engine dies of them (vllm issue 16668).

    ``echo`` asks for them too: always in a chat, and with ``logprobs`` in a completion.
    """
    for fields in (payload, payload.get("sampling_params")):
        if isinstance(fields, dict) and fields.get("prompt_logprobs") is not None:
            raise Refusal(
                400, "prompt_logprobs are not available where adapters are served", "prompt_logprobs"
            )
    completion = "prompt" in payload and "messages" not in payload
    if payload.get("echo") not in (None, False) and not (completion and payload.get("logprobs") is None):
        raise Refusal(
            400, "echo works for completions without logprobs only, where adapters are served", "echo"
        )


def _check_list(payload: Mapping[str, Any], field: str, fits: Callable[[Any], bool]) -> None:
    items = payload.get(field)
    if not isinstance(items, list):
        return
    if field == "input" and len(items) > MAX_ITEMS:
        raise Refusal(400, f"{field} holds more than {MAX_ITEMS} items", field)
    num_odd = 0
    for item in items:
        num_odd += not (isinstance(item, dict) and fits(item))
        if num_odd > MAX_ODD:
            raise Refusal(400, f"{field}: more than {MAX_ODD} items have an unusual form", field)


def _is_chat_message(item: Mapping[str, Any]) -> bool:
    return (
        isinstance(item.get("role"), str)
        and isinstance(item.get("content"), str | list | dict | None)
        and isinstance(item.get("name"), str | None)
    )


def _is_item(item: Mapping[str, Any]) -> bool:
    kind = item.get("type", "message")
    if kind == "message":
        return _is_message(item)
    if kind == "function_call":
        return _texts(item, "call_id", "name", "arguments") and _only(item, "call_id", "name", "arguments")
    if kind == "function_call_output":
        return _texts(item, "call_id", "output") and _only(item, "call_id", "output")
    if kind == "reasoning":
        parts = [*_list(item, "summary"), *_list(item, "content")]
        return _texts(item, "id") and _only(item, "summary", "content") and all(map(_is_thought, parts))
    return False


def _is_message(item: Mapping[str, Any]) -> bool:
    content = item.get("content")
    if not _only(item, "role", "content") or item.get("role") not in ROLES:
        return False
    if isinstance(content, str):
        return True
    if "id" in item:  # an earlier response
        return "status" in item and _all(content, "output_text", ("annotations", []))
    return _all(content, "input_text")


def _is_thought(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and part.get("type") in ("summary_text", "reasoning_text")
        and _texts(part, "text")
    )


def _is_function(tool: Mapping[str, Any]) -> bool:
    return (
        tool.get("type") == "function"
        and _texts(tool, "name")
        and isinstance(tool.get("parameters"), dict | None)
        and isinstance(tool.get("strict"), bool | None)
        and isinstance(tool.get("description"), str | None)
    )


def _only(item: Mapping[str, Any], *names: str) -> bool:
    """Return whether an item has only these keys and valid ones that all types may have."""
    known = set(item) <= {*names, "type", "id", "status"}
    return known and isinstance(item.get("id"), str | None) and item.get("status") in (None, *STATUSES)


def _texts(item: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(item.get(name), str) for name in names)


def _list(item: Mapping[str, Any], name: str) -> list[Any]:
    value = item.get(name)
    return value if isinstance(value, list) else [] if value is None else [value]


def _all(parts: Any, kind: str, *more: tuple[str, Any]) -> bool:
    return isinstance(parts, list) and all(
        isinstance(part, dict)
        and part.get("type") == kind
        and _texts(part, "text")
        and all(part.get(name) == value for name, value in more)
        for part in parts
    )
