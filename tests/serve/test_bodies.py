"""From request bodies to texts: whatever arrives, a list of texts, None or a refusal."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fedrouter.serve.bodies import CHAT, COMPLETIONS, Refusal, parse_routed, routed_texts

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


@given(
    path=st.sampled_from([CHAT, COMPLETIONS]),
    payload=st.fixed_dictionaries({}, optional={"messages": messages | anything, "prompt": anything}),
)
def test_any_json_gives_texts_or_none(path: str, payload: dict[str, Any]) -> None:
    texts = routed_texts(path, payload, lambda ids: " ".join(map(str, ids)))
    assert texts is None or all(isinstance(text, str) for text in texts)
    for text in texts or ():
        text.encode()  # no half surrogate pair is left


@given(st.binary(max_size=60) | anything.map(lambda value: json.dumps(value).encode()))
def test_other_bodies_are_not_ours(body: bytes) -> None:
    assert parse_routed(body) is None
    assert parse_routed(b'{"model": "fedrouter"' + body) is None  # not JSON, whatever follows


@given(st.dictionaries(st.text(max_size=6), anything, max_size=4), st.booleans())
def test_a_body_that_names_the_virtual_model_is_ours(payload: dict[str, Any], ascii_only: bool) -> None:
    payload["model"] = "fedrouter"
    assert parse_routed(json.dumps(payload, ensure_ascii=ascii_only).encode()) == payload


def test_vectors_of_a_prompt_are_refused() -> None:
    try:
        routed_texts(COMPLETIONS, {"prompt": "text", "prompt_embeds": "AAAA"}, str)
    except Refusal as refusal:
        assert refusal.payload["error"]["param"] == "prompt_embeds"
    else:
        raise AssertionError("not refused")
