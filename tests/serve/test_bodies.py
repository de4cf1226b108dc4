"""From request bodies to texts: whatever arrives, a list of texts, None or a refusal."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrouter.serve.bodies import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    RESPONSES,
    ROUTED,
    Refusal,
    conversations,
    parse_routed,
)

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "tool"]) | scalars},
        optional={
            "content": anything
            | st.lists(
                st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"]), "text": anything}),
                max_size=3,
            )
        },
    ),
    max_size=4,
)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


@given(
    path=st.sampled_from(ROUTED),
    payload=st.fixed_dictionaries(
        {}, optional={"messages": messages | anything, "prompt": anything, "input": messages | anything}
    ),
)
def test_any_json_gives_texts_or_none(path: str, payload: dict[str, Any]) -> None:
    found = conversations(path, payload, lambda ids: " ".join(map(str, ids)))
    for text in [text for turns in found or () for text in turns]:
        assert text.strip()
        text.encode()  # no half surrogate pair is left


@given(st.binary(max_size=60) | anything.map(lambda value: json.dumps(value).encode()))
def test_other_bodies_are_not_ours(body: bytes) -> None:
    assert parse_routed(body) is None
    assert parse_routed(b'{"model": "fedrouter"' + body) is None  # not JSON, whatever follows


@given(st.dictionaries(st.text(max_size=6), anything, max_size=4), st.booleans())
def test_a_body_that_names_the_virtual_model_is_ours(payload: dict[str, Any], ascii_only: bool) -> None:
    payload["model"] = "fedrouter"
    assert parse_routed(json.dumps(payload, ensure_ascii=ascii_only).encode()) == payload


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}


@pytest.mark.parametrize(
    ("path", "payload", "texts"),
    [
        (CHAT, {"messages": [user("a"), {"role": "assistant", "content": "x"}, user("b")]}, ["a", "b"]),
        (
            CHAT,
            {"messages": [{"role": "system", "content": "s"}, user([text("a"), IMAGE, text("b")])]},
            ["a\nb"],
        ),
        (CHAT, {"messages": [user("a"), {"role": "tool", "tool_call_id": "1", "content": "42"}]}, ["a"]),
        (CHAT, {"messages": [user([IMAGE])]}, []),
        (RESPONSES, {"input": "a", "instructions": "s"}, ["a"]),
        (RESPONSES, {"input": [user("a")]}, ["a"]),
        (RESPONSES, {"input": [{"type": "message", **user([{"type": "input_text", "text": "a"}])}]}, ["a"]),
        (
            RESPONSES,
            {
                "input": [
                    user("a"),
                    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "1", "output": "42"},
                    {"role": "developer", "content": "s"},
                ]
            },
            ["a"],
        ),
        (MESSAGES, {"system": "s", "messages": [user("a")]}, ["a"]),
        (MESSAGES, {"system": [text("s")], "messages": [user([text("a"), {"type": "image"}])]}, ["a"]),
        (
            MESSAGES,
            {"messages": [user("a"), user([{"type": "tool_result", "tool_use_id": "1", "content": "42"}])]},
            ["a"],
        ),
    ],
)
def test_the_text_of_user_turns_counts(path: str, payload: dict[str, Any], texts: list[str]) -> None:
    assert conversations(path, payload, str) == [texts]


@pytest.mark.parametrize(
    ("path", "payload"),
    [
        (COMPLETIONS, {"prompt": "text", "prompt_embeds": "AAAA"}),
        (CHAT, {"messages": [user([text("a"), {"type": "prompt_embeds", "data": "AAAA"}])]}),
    ],
)
def test_vectors_of_a_prompt_are_refused(path: str, payload: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as refused:
        conversations(path, payload, str)
    assert refused.value.payload["error"]["param"] == "prompt_embeds"
