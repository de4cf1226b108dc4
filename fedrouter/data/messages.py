"""OpenAI and ShareGPT messages → turns: roles, content parts, tool calls, weights."""

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from fedrouter.data.readers import parse_json
from fedrouter.errors import DataError
from fedrouter.types import Turn

Json = TypeVar("Json", str, dict[str, Any])

ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    "developer": "system",
    "function": "tool",
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}
# Further keys of a message that servers pass to chat templates, by role.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
PASSED_ON = {"assistant": ("name", *THOUGHTS), "tool": ("name", "tool_call_id")}
KNOWN = ("role", "from", "content", "value", "weight", "tool_calls", "function_call")
CALL, FUNCTION = ("id", "type", "function"), ("name", "arguments")  # keys of a tool call and its function


def turns_of(
    where: str, messages: list[Any], field: str, extra: set[str], ignore: frozenset[str], learned: bool = True
) -> list[Turn]:
    """Convert a list of messages to turns.

    Parameters
    ----------
    extra : gets ``field.key`` for every unread key with text, at any depth of a message.
    learned : whether assistant turns without a weight carry loss.

    Raises
    ------
    DataError
        If a message cannot be used; names it.
    """
    if not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{where}: {field} must be a list of objects with role and content")
    turns = []
    for number, message in enumerate(messages, start=1):
        given = {k: v for k, v in message.items() if v is not None and f"{field}.{k}" not in ignore}
        unread: set[str] = set()
        turns.append(_turn(f"{where}: message {number}", given, unread, learned))
        extra.update(f"{field}.{key}" for key in unread)
    return turns


def _turn(where: str, given: Mapping[str, Any], unread: set[str], learned: bool) -> Turn:
    name = given.get("role", given.get("from"))
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"{where} has role {name!r}; accepted: {', '.join(ROLES)}")
    if "from" in given and given["from"] not in [other for other, its in ROLES.items() if its == role]:
        raise DataError(f"{where}: role and from differ; keep one of them")
    if "content" in given and "value" in given and given["content"] != given["value"]:
        raise DataError(f"{where}: content and value differ; keep one of them")
    passed_on = PASSED_ON.get(role, ("name",))
    unread |= {key for key in given if key not in (*KNOWN, *passed_on) and has_text(given[key])}
    more: dict[str, Any] = {key: text_of(where, key, given[key]) for key in passed_on if key in given}
    content, calls, form = given.get("content", given.get("value")), given.get("tool_calls"), "tool_calls"
    is_call = "function_call" in (name, given.get("from"))  # its text is the call
    if bool(calls) + ("function_call" in given) + is_call > 1:
        raise DataError(f"{where}: has calls in two forms, tool_calls and function_call; keep one of them")
    if is_call:
        form = "function_call"
        content, calls = "", [parse_json(where, text_of(where, "value", content), "a function call")]
    elif "function_call" in given:
        form, calls = "function_call", [given["function_call"]]
    if calls:
        if role != "assistant":
            raise DataError(f"{where}: only assistant messages may have tool_calls")
        called = [_call(where, call, unread, form) for call in listed(where, "tool_calls", calls)]
        more["tool_calls"] = called
        content = "" if content is None else content
    text = _content(where, content, unread)
    if role == "user" and not text.strip():
        raise DataError(f"{where}: field content is empty")
    weight = given.get("weight", 1 if learned else 0)
    if weight not in (0, 1, "0", "1"):
        raise DataError(f"{where}: weight {weight!r}; accepted: 0 and 1")
    return Turn(role, text, more, role != "assistant" or int(weight) == 1)


def _content(where: str, content: Any, unread: set[str]) -> str:
    """Return a message's text; joins content parts as the server does."""
    if not isinstance(content, list):
        return text_of(where, "content", content)
    texts = []
    for number, part in enumerate(content, start=1):
        given = {"type": "text", "text": part} if isinstance(part, str) else part
        if not isinstance(given, dict) or given.get("type") != "text":
            found = given.get("type") if isinstance(given, dict) else shown(given)
            raise DataError(
                f"{where}: field content must be text or parts of type text; "
                f"part {number} is of type {found!r}"
            )
        unread |= {f"content.{k}" for k in given if k not in ("type", "text") and has_text(given[k])}
        texts.append(text_of(where, f"content, part {number}", given.get("text")))
    return "\n".join(texts)


def _call(where: str, call: Any, unread: set[str], form: str) -> dict[str, Any]:
    """Return a tool call as vLLM passes it to chat templates: its arguments are an object, not text.

    Parameters
    ----------
    unread : gets ``form.key`` for every unread key with text.
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: a tool call needs a function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parse_json(f"{where}: arguments", arguments, "an object") if arguments.strip() else {}
    if not isinstance(arguments := {} if arguments is None else arguments, dict):
        raise DataError(f"{where}: arguments of a tool call must be an object, found {shown(arguments)}")
    known = (*CALL, *FUNCTION) if function is call else CALL
    unread |= {f"{form}.{k}" for k in call if k not in known and has_text(call[k])}
    if function is not call:
        inner = {k for k in function if k not in FUNCTION and has_text(function[k])}
        unread |= {f"{form}.function.{k}" for k in inner}
    if call.get("type", "function") not in ("function", None):
        raise DataError(f"{where}: a tool call of type {call['type']!r}; accepted: function")
    kept = {"id": call["id"]} if "id" in call else {}
    return _utf8(
        where, {**kept, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
    )


def tool_list(where: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    """Return a row's tools, each as ``{"type": "function", "function": …}``."""
    tools = [] if value == "" else listed(where, "tools", value)
    if not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: tools must be a list of objects")
    wrapped = [t if "function" in t else {"type": "function", "function": t} for t in tools]
    return tuple(_utf8(where, tool) for tool in wrapped)


def listed(where: str, name: str, value: Any) -> list[Any]:
    """Return a list; parses it if it is JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(f"{where}: {name}", value, "a list")
    if not isinstance(value, list):
        keys = "" if name.startswith("tool") else " with role and content"
        raise DataError(f"{where}: {name} must be a list of objects{keys}, found {shown(value)}")
    return value


def text_of(where: str, name: str, value: Any) -> str:
    """Return a value that must be text, possibly empty.

    Raises
    ------
    DataError
        If the value is not text, or cannot be encoded in UTF-8.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name} must be text, found {shown(value)}")
    return _utf8(f"{where}: field {name}", value)


def has_text(value: Any) -> bool:
    """Return whether a value contains text, at any depth."""
    if isinstance(value, str):
        return bool(value.strip())
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(has_text, values))


def shown(value: Any) -> str:
    """Return an object as JSON, for other values the name of the type."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else type(value).__name__


def _utf8(where: str, value: Json) -> Json:
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} contains half a character (a lone surrogate); save it as UTF-8 text"
        ) from error
    return value
