"""Forms of data: the record that each field ends up in, and the warnings about other fields."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from fedrouter.data import load_records
from fedrouter.errors import ConfigError, DataError
from fedrouter.types import Record, Turn

CALL = {"id": "1", "type": "function", "function": {"name": "stock", "arguments": '{"item": "lamp"}'}}
READ = {"id": "1", "type": "function", "function": {"name": "stock", "arguments": {"item": "lamp"}}}
TOOL = {"type": "function", "function": {"name": "stock", "parameters": {"type": "object", "properties": {}}}}


def load(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> tuple[list[Record], list[str]]:
    """Return the records, and the warnings about their file."""
    path = tmp_path / "rows.jsonl"
    said: list[str] = []
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = load_records(str(path), say=said.append, **options)
    return records, [line.replace(f"{tmp_path}/", "") for line in said]


def one(tmp_path: Path, row: dict[str, Any], **options: Any) -> Record:
    (record,), said = load(tmp_path, row, **options)
    assert said == []
    return record


def refused(tmp_path: Path, row: dict[str, Any], **options: Any) -> str:
    with pytest.raises(DataError) as error:
        load(tmp_path, row, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def turns(*pairs: tuple[str, str]) -> tuple[Turn, ...]:
    return tuple(Turn(role, content) for role, content in pairs)


def test_alpaca_with_system_and_history(tmp_path: Path) -> None:
    row = {
        "system": "Be short.",
        "instruction": "Sum",
        "input": "1 2",
        "output": "3",
        "history": [["Hi", "Yes?"]],
    }
    before = turns(("system", "Be short."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Sum\n\n1 2"))
    assert one(tmp_path, row) == Record(before, "3")
    as_messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    assert one(tmp_path, {**row, "history": as_messages}) == Record(before, "3")
    nothing = {**row, "system": "", "history": [], "input": None}
    assert one(tmp_path, nothing) == Record(turns(("user", "Sum")), "3")
    assert "history must be a list" in refused(tmp_path, {**row, "history": "Hi"})


def test_dollys_context_is_input(tmp_path: Path) -> None:
    row = {"instruction": "When?", "context": "In May 1999.", "response": "1999"}
    assert one(tmp_path, row) == Record(turns(("user", "When?\n\nIn May 1999.")), "1999")


def test_sharegpt(tmp_path: Path) -> None:
    said = [("system", "Be."), ("human", "Hi"), ("gpt", "Yes?"), ("human", "Bye"), ("gpt", "Bye.")]
    row = {"conversations": [{"from": role, "value": text} for role, text in said]}
    want = turns(("system", "Be."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye"))
    assert one(tmp_path, row) == Record(want, "Bye.")
    assert one(tmp_path, {**row, "conversations": row["conversations"][1:], "system": "Be."}) == Record(
        want, "Bye."
    )
    assert "both a system message and a field system" in refused(tmp_path, {**row, "system": "Be."})
    unfinished = {"conversations": row["conversations"][:-1]}
    assert "conversations must end with a user turn and the assistant's" in refused(tmp_path, unfinished)
    tools = [
        {"from": "human", "value": "Lamps?"},
        {"from": "function_call", "value": '{"name": "stock", "arguments": {"item": "lamp"}}'},
        {"from": "observation", "value": "7"},
        {"from": "gpt", "value": "Seven."},
    ]
    record = one(tmp_path, {"conversations": tools, "tools": json.dumps([TOOL["function"]])})
    assert [turn.role for turn in record.turns] == ["user", "assistant", "tool"]
    assert record.turns[1].more["tool_calls"][0]["function"] == READ["function"]
    assert record.tools == (TOOL,)


def test_conversational_prompt_completion_learns_the_completion_alone(tmp_path: Path) -> None:
    prompt = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Bye"},
    ]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "Bye."}]}
    record = one(tmp_path, row)
    assert [(t.role, t.content) for t in record.turns] == [
        ("user", "Hi"),
        ("assistant", "Yes?"),
        ("user", "Bye"),
    ]
    assert not record.turns[1].learned
    assert record.completion == "Bye." and record.answer is None
    assert "field prompt must be text, found list" in refused(tmp_path, {**row, "completion": "Bye."})


def test_openai_tools_calls_results_parts_and_weights(tmp_path: Path) -> None:
    row: dict[str, Any] = {
        "messages": [
            {"role": "developer", "content": "Be."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Lamps"}, {"type": "text", "text": "or tea?"}],
            },
            {"role": "assistant", "content": "Hm.", "weight": 0},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "7"},
            {"role": "assistant", "content": "Seven.", "weight": 1},
        ],
        "tools": [TOOL],
        "parallel_tool_calls": False,
    }
    record = one(tmp_path, row)
    assert record == Record(
        (
            Turn("system", "Be."),
            Turn("user", "Lamps\nor tea?"),
            Turn("assistant", "Hm.", learned=False),
            Turn("assistant", "", {"tool_calls": [READ]}),
            Turn("tool", "7", {"tool_call_id": "1"}),
        ),
        "Seven.",
        tools=(TOOL,),
    )
    calling = one(tmp_path, {"messages": row["messages"][:4], "tools": [TOOL]})
    assert calling.answer == Turn("assistant", "", {"tool_calls": [READ]})
    assert '"stock"' in calling.completion, "what is embedded of an answer that only calls"
    legacy = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    old = one(tmp_path, {"messages": [row["messages"][1], legacy], "functions": [TOOL["function"]]})
    assert old.answer is not None
    assert old.tools == (TOOL,) and old.answer.more["tool_calls"][0]["function"] == READ["function"]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "part 1 is of type 'image_url'",
        ),
        ({"role": "user", "content": " "}, "message 1: field content is empty"),
        (
            {"role": "user", "content": "x", "tool_calls": [CALL]},
            "only assistant messages may have tool_calls",
        ),
        ({"role": "assistant", "content": None}, "message 1: field content must be text, found NoneType"),
        (
            {"role": "assistant", "content": "", "tool_calls": ["stock"]},
            "a tool call needs a function with a name",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{item"}}]},
            "message 1: arguments: not JSON",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            "arguments of a tool call must be an object, found list",
        ),
        ({"role": "assistant", "content": "x", "weight": 0.5}, "message 1: weight 0.5; accepted: 0 and 1"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "\ud83d"}}}]},
            "contains half a character",
        ),
        ({"content": "x"}, "message 1 has role None"),
        ({"role": "user", "content": "x", "value": "y"}, "message 1: content and value differ; keep one"),
        ({"role": "user", "from": "gpt", "content": "x"}, "message 1: role and from differ; keep one"),
        (
            {"role": "assistant", "tool_calls": [CALL], "function_call": CALL["function"]},
            "calls in two forms, tool_calls and function_call; keep one",
        ),
        (
            {"from": "function_call", "value": json.dumps(CALL["function"]), "tool_calls": [CALL]},
            "calls in two forms, tool_calls and function_call; keep one",
        ),
        (
            {"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]},
            "a tool call of type 'custom'; accepted: function",
        ),
    ],
)
def test_messages_that_cannot_be_used_are_named(tmp_path: Path, message: dict[str, Any], said: str) -> None:
    rest = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]
    found = refused(tmp_path, {"messages": [message, *rest]})
    assert said in found and "rows.jsonl:1: message 1" in found


def test_a_conversation_without_weight_has_nothing_to_learn(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a", "weight": 0}]
    nothing = "every assistant turn after the first user turn has weight 0"
    assert nothing in refused(tmp_path, {"messages": messages})
    greeting = {"role": "assistant", "content": "Welcome", "weight": 1}
    assert nothing in refused(tmp_path, {"messages": [greeting, *messages]})


def test_what_the_assistant_says_before_the_user_carries_no_loss(tmp_path: Path) -> None:
    said = [("system", "Be."), ("gpt", "Welcome."), ("human", "Hi"), ("gpt", "Yes?")]
    row = {"conversations": [{"from": role, "value": text} for role, text in said]}
    records, notes = load(tmp_path, row, {"prompt": "p", "completion": "c"})
    assert [turn.learned for turn in records[0].conversation] == [True, False, True, True]
    assert records[0].completion == "Yes?"
    assert notes == [
        "rows.jsonl: 1 of 2 rows begin with the assistant: what it says before the first user turn carries "
        "no loss, because no server generates it"
    ]


def test_any_names_by_mapping(tmp_path: Path) -> None:
    row = {"question": "Q", "answer": "A", "category": "quiz", "passage": "P"}
    fields = {"prompt": "question", "completion": "answer", "task": "category", "context": "passage"}
    assert one(tmp_path, row, fields=fields) == Record(turns(("user", "Q\n\nP")), "A", "quiz")
    records, said = load(tmp_path, {**row, "prompt": "another"}, fields=fields)
    assert records[0].turns[0].content == "Q\n\nP" and "prompt (100 % of rows)" in said[0]
    assert "missing fields: found question, answer, category, passage" in refused(tmp_path, row)
    plain = {"prompt": "p", "completion": "c"}
    found = "missing fields: found prompt, completion; data.fields.prompt names q, which this row does not"
    assert found in refused(tmp_path, plain, fields={"prompt": "q"})
    found = "missing fields: found completion; data.ignore leaves out prompt; accepted"
    assert found in refused(tmp_path, plain, ignore=["prompt"])
    wrong = {**fields, "task": "topic"}
    assert "no row has the field topic, which data.fields.task names" in refused(tmp_path, row, fields=wrong)
    with pytest.raises(ConfigError, match=r"data.fields.promt: not a field of any form"):
        load(tmp_path, row, fields={"promt": "question"})


def test_fields_that_nobody_reads_are_named_once_a_file_with_their_share(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "c", "source": "web", "score": 3, "note": ""} for _ in range(4)]
    rows[2]["note"] = ["deep", {"er": "text"}]
    rows[1]["messages"] = None
    _, said = load(tmp_path, *rows)
    assert said == [
        "rows.jsonl: unread fields: source (100 % of rows), note (25 % of rows); map them with "
        'data.fields.NAME, or ignore them with data.ignore = ["source", "note"]'
    ]
    assert load(tmp_path, *rows, ignore=["source", "note"])[1] == []
    chat = {
        "messages": [{"role": "user", "content": "u", "mood": "calm"}, {"role": "assistant", "content": "a"}]
    }
    assert "messages.mood (100 % of rows)" in load(tmp_path, chat)[1][0]
    assert load(tmp_path, chat, ignore=["messages.mood"])[1] == []
    one_way = {"prompt": "p", "completion": "c", "system": "Be."}
    assert one(tmp_path, one_way, ignore=["system"]) == Record(turns(("user", "p")), "c")


def test_text_deep_in_messages_that_nobody_reads_is_named(tmp_path: Path) -> None:
    function = {"name": "stock", "arguments": "{}", "result": "7"}
    messages = [
        {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "u", "annotation": "a"}]},
        {"role": "assistant", "tool_calls": [{"function": function, "comment": "c"}], "reasoning": "r"},
        {"role": "user", "content": "v", "reasoning": "s"},
        {"role": "assistant", "function_call": {**function, "id": "1"}},
    ]
    fields = [
        "messages.content.annotation",
        "messages.function_call.result",
        "messages.reasoning",
        "messages.tool_calls.comment",
        "messages.tool_calls.function.result",
    ]
    (record, _), (said,) = load(tmp_path, {"messages": messages}, {"prompt": "p", "completion": "c"})
    assert all(f"{name} (50 % of rows)" in said for name in fields)
    assert [dict(turn.more) for turn in record.turns[::2]] == [{"name": "Ann"}, {}]
    assert record.turns[1].more["reasoning"] == "r"
    calls = [name for name in fields if name != "messages.reasoning"]
    assert (
        "messages.reasoning (100 % of rows); " in load(tmp_path, {"messages": messages}, ignore=calls)[1][0]
    )


def test_empty_answers_are_kept_and_blank_prompts_refused(tmp_path: Path) -> None:
    assert one(tmp_path, {"prompt": "p", "completion": ""}).completion == ""
    assert "rows.jsonl:1: field instruction is empty" in refused(
        tmp_path, {"instruction": " ", "output": "o"}
    )
    assert one(tmp_path, {"instruction": "", "input": "i", "output": "o"}).turns[0].content == "i"


def test_a_record_knows_its_place(tmp_path: Path) -> None:
    row = {"prompt": "p", "completion": "c"}
    assert [r.where for r in load(tmp_path, row, row)[0]] == [f"{tmp_path}/rows.jsonl:{n}" for n in (1, 2)]


def test_conversations_in_parquet(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "Lamps?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "7", "tool_call_id": "1"},
        {"role": "assistant", "content": "Seven."},
    ]
    datasets.Dataset.from_list([{"messages": messages}]).to_parquet(tmp_path / "a.parquet")
    (record,) = load_records(str(tmp_path / "a.parquet"))
    assert record.turns[1].more == {"tool_calls": [READ]} and record.turns[1].content == ""
    assert record.turns[2] == Turn("tool", "7", {"tool_call_id": "1"})
