"""Payloads that would fail in vLLM or block it are refused; those that clients send are not."""

from typing import Any

import pytest

from fedrouter.serve.asgi import Refusal
from fedrouter.serve.paths import CHAT, COMPLETIONS, EMBEDDINGS, INVOCATIONS, RESPONSES
from fedrouter.serve.shapes import MAX_ITEMS, MAX_ODD, check_shapes

TEXT = {"type": "input_text", "text": "x"}
# An agent's history in all forms that OpenAI's client sends.
USUAL: list[Any] = [
    *({"role": role, "content": "x"} for role in ("user", "assistant", "system", "developer")),
    {"type": "message", "role": "user", "content": [TEXT, TEXT]},
    {
        "type": "message",
        "id": "m",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "x", "annotations": []}],
    },
    {
        "type": "function_call",
        "id": "f",
        "call_id": "1",
        "name": "f",
        "arguments": "{}",
        "status": "completed",
    },
    {"type": "function_call_output", "call_id": "1", "output": "x"},
    {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "x"}]},
    {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "x"}]},
]
CONTENTS: tuple[Any, ...] = (5, {}, [5], [{}], [{"type": "input_text"}])
ODD: list[Any] = [
    *(5, "x", None, [], {}, {"type": "x"}, {"type": 5}, {"role": "user"}, {"role": "x", "content": "x"}),
    *({"role": "user", "content": value} for value in CONTENTS),
    {"role": "user", "content": "x", "more": 5},
    {"role": "assistant", "content": [{"type": "output_text", "text": "x"}]},
    {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]},
    {"type": "function_call", "call_id": "1", "name": "f"},
    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}", "status": 7},
    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}", "id": 7},
    {"type": "function_call_output", "call_id": "1", "output": [5]},
    {"type": "reasoning", "id": "r", "summary": [{}]},
    {"type": "reasoning", "id": "r", "summary": 5},
]


@pytest.mark.parametrize("value", [-1, 0, 1.5, True, False, "x", "", [], [{}]])
def test_payloads_that_fail_in_vllm_are_refused(value: Any) -> None:
    for fine in ({}, {"structured_outputs": None}, {"structured_outputs": {"regex": "a"}}):
        check_shapes(COMPLETIONS, fine)
    with pytest.raises(Refusal) as refused:
        check_shapes(COMPLETIONS, {"structured_outputs": value})
    assert refused.value.status == 400


def test_a_long_history_passes() -> None:
    check_shapes(RESPONSES, {"input": USUAL * (MAX_ITEMS // len(USUAL)), "tools": [_function()] * 200})
    with pytest.raises(Refusal, match="more than 2000 items"):
        check_shapes(RESPONSES, {"input": USUAL[:1] * (MAX_ITEMS + 1)})


@pytest.mark.parametrize("path", [RESPONSES, f"{RESPONSES}/render", INVOCATIONS])
@pytest.mark.parametrize("item", ODD)
def test_few_odd_items_pass_and_many_do_not(path: str, item: Any) -> None:
    check_shapes(path, {"input": USUAL + [item] * MAX_ODD})
    with pytest.raises(Refusal, match="unusual form"):
        check_shapes(path, {"input": USUAL + [item] * (MAX_ODD + 1)})


@pytest.mark.parametrize(
    "item", [5, {}, {"role": 5, "content": "x"}, {"role": "user", "content": 5}, {"role": "user", "name": 5}]
)
def test_messages_are_checked_too(item: Any) -> None:
    usual = [{"role": "user", "content": "x", "name": "n"}, {"role": "assistant", "tool_calls": []}]
    check_shapes(CHAT, {"messages": usual * 2_000 + [item]})
    with pytest.raises(Refusal, match="unusual form"):
        check_shapes(CHAT, {"messages": usual + [item] * (MAX_ODD + 1)})


@pytest.mark.parametrize(
    "tool", [5, {}, {"type": "function"}, {"type": "function", "name": "f", "strict": 5}]
)
def test_tools_are_checked_too(tool: Any) -> None:
    check_shapes(RESPONSES, {"tools": [_function(), tool]})
    with pytest.raises(Refusal, match="unusual form"):
        check_shapes(RESPONSES, {"tools": [tool] * (MAX_ODD + 1)})


def test_other_paths_have_other_inputs() -> None:
    check_shapes(EMBEDDINGS, {"input": ["x"] * 5_000})


def _function() -> dict[str, Any]:
    return {
        "type": "function",
        "name": "f",
        "parameters": {"type": "object"},
        "strict": True,
        "description": "d",
    }


@pytest.mark.parametrize(
    ("path", "payload"),
    [
        (CHAT, {"messages": [], "prompt_logprobs": 0}),
        (COMPLETIONS, {"prompt": "x", "prompt_logprobs": 5}),
        ("/inference/v1/generate", {"token_ids": [1], "sampling_params": {"prompt_logprobs": 1}}),
        (CHAT, {"messages": [], "echo": True}),
        (INVOCATIONS, {"messages": [], "echo": "true"}),
        (COMPLETIONS, {"prompt": "x", "echo": True, "logprobs": 0}),
        (COMPLETIONS, {"prompt": "x", "echo": 1, "logprobs": 2}),
    ],
)
def test_log_likelihoods_of_a_prompt_are_refused_because_the_engine_dies_of_them(
    path: str, payload: dict[str, Any]
) -> None:
    with pytest.raises(Refusal, match="where adapters are served"):
        check_shapes(path, payload)


@pytest.mark.parametrize(
    ("path", "payload"),
    [
        (CHAT, {"messages": [], "logprobs": True, "top_logprobs": 5, "echo": False, "prompt_logprobs": None}),
        (COMPLETIONS, {"prompt": "x", "echo": True}),
        (COMPLETIONS, {"prompt": "x", "logprobs": 5}),
    ],
)
def test_log_likelihoods_of_the_answer_pass(path: str, payload: dict[str, Any]) -> None:
    check_shapes(path, payload)
