"""From payloads to texts: any payload gives a list of texts or a refusal."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrouter.serve.asgi import Refusal
from fedrouter.serve.paths import CHAT, COMPLETIONS, MESSAGES, RESPONSES, ROUTED
from fedrouter.serve.prompts import conversations, model_of

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
def test_any_json_gives_texts_or_a_refusal(path: str, payload: dict[str, Any]) -> None:
    try:
        found = conversations(path, payload, lambda ids: " ".join(map(str, ids)))
    except Refusal as refusal:
        assert refusal.status == 400
        return
    assert found
    for text in [text for turns in found for text in turns]:
        assert text.strip()
        text.encode()  # no half surrogate pair is left


@given(anything)
def test_no_model_means_the_virtual_model(model: Any) -> None:
    if model is None or model == "":
        assert model_of({"model": model}) == model_of({}) == "fedrouter"
    elif isinstance(model, str):
        assert model_of({"model": model}) == model
    else:
        with pytest.raises(Refusal, match="model must be a string"):
            model_of({"model": model})


@pytest.mark.parametrize(
    "prompt",
    [
        *([1.0, 2.0], [True], [[True]], [[1.0]], ["1", 2], [["1"]], [[["a"]]], [-1], [[1], "a"], [None], []),
        *({}, 5, None, [[1], [2.5]], [{}], {"a": 1}, True, [2**70]),
    ],
)
def test_a_prompt_that_vllm_might_read_otherwise_is_refused(prompt: Any) -> None:
    def decode(ids: Any) -> str:
        if max(ids) > 2**31:
            raise OverflowError
        return "x"

    with pytest.raises(Refusal) as refused:
        conversations(COMPLETIONS, {"prompt": prompt}, decode)
    assert refused.value.status == 400


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
@pytest.mark.parametrize(
    "content",
    [5, True, {}, {"type": "text"}, [5], [{}], [{"text": "a"}], [["a"]], [None], [text(5)]],  # type: ignore[arg-type]
)
def test_content_that_vllm_might_read_otherwise_is_refused(path: str, content: Any) -> None:
    payload = {"messages": [user(content)], "input": [user(content)]}
    with pytest.raises(Refusal) as refused:
        conversations(path, payload, str)
    assert refused.value.status == 400


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
        (CHAT, {"messages": [user(["a", {"type": "refusal", "refusal": "b"}])]}, ["a\nb"]),
        (CHAT, {"messages": [user([{"type": "output_text", "text": "a"}])]}, ["a"]),
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
    error: Any = refused.value.payload()["error"]
    assert error["param"] == "prompt_embeds"
