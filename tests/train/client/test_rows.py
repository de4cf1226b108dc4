"""Rows as the model sees them: tokens with loss, cuts, and limits of chat templates."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrouter.builtin import base_path
from fedrouter.errors import DataError
from fedrouter.models import load_tokenizer, render
from fedrouter.train.client.rows import Tokeniser, TokenRow, load_rows
from fedrouter.types import Record, Turn

# Marks every turn and renders everything, as templates of chat models do.
CHATML = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} {{ c.function.arguments | tojson }}"
    "{% endfor %}"
    "</s>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Drops the thoughts of earlier answers, and opens a thought before the next answer.
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "stock", "arguments": {"item": "lamp"}}}
TOOL = {"type": "function", "function": {"name": "stock"}}
QUESTION = (Turn("user", "Which lamp?"),)
CHAT = (Turn("user", "One?"), Turn("assistant", "First answer"), Turn("user", "Two?"))


@pytest.fixture(scope="module")
def tokeniser() -> Callable[..., Tokeniser]:
    tokenizer = load_tokenizer(base_path("builtin:tiny"))
    own = tokenizer.chat_template

    def make(template: str | None = CHATML, max_length: int = 512, **options: Any) -> Tokeniser:
        tokenizer.chat_template = template or own
        return Tokeniser(tokenizer, max_length, **options)

    return make


def text(tokeniser: Tokeniser, row: TokenRow) -> str:
    return str(tokeniser._tokenizer.decode(row.ids))


def learned(tokeniser: Tokeniser, row: TokenRow) -> list[str]:
    """Return the parts of a row's text that carry loss."""
    edges = np.flatnonzero(np.diff(np.r_[0, row.learned, 0]))
    return [str(tokeniser._tokenizer.decode(row.ids[a:b])) for a, b in edges.reshape(-1, 2)]


def test_the_prompt_is_rendered_as_on_a_server_and_the_answer_ends(
    tokeniser: Callable[..., Tokeniser],
) -> None:
    tok = tokeniser(None)
    (row,) = tok.rows([Record(QUESTION, "The red one.")])
    prompt = render(tok._tokenizer, QUESTION)
    ids = tok._tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert row.ids[: len(ids)].tolist() == ids
    assert not row.learned[: len(ids)].any() and row.learned[len(ids) :].all()
    assert learned(tok, row) == ["The red one.</s>"]


def test_all_answers_of_a_conversation_or_only_the_last_carry_loss(
    tokeniser: Callable[..., Tokeniser],
) -> None:
    tok = tokeniser()
    (row,) = tok.rows([Record(CHAT, "Second answer")])
    assert learned(tok, row) == ["First answer</s>", "Second answer</s>"]
    prompt = render(tok._tokenizer, CHAT)
    assert text(tok, row) == prompt + "Second answer</s>", "one row, rendered as on a server"
    last = tokeniser(last=True)
    assert learned(last, last.rows([Record(CHAT, "Second answer")])[0]) == ["Second answer</s>"]
    unweighted = (CHAT[0], Turn("assistant", "First answer", learned=False), CHAT[2])
    assert learned(tok, tok.rows([Record(unweighted, "Second answer")])[0]) == ["Second answer</s>"]


def test_answers_that_a_template_later_changes_get_their_own_rows(
    tokeniser: Callable[..., Tokeniser],
) -> None:
    tok = tokeniser(THINKING)
    rows = tok.rows([Record(CHAT, "<think>\nhm\n</think>\n\nSecond answer")])
    assert [learned(tok, row) for row in rows] == [
        ["\n</think>\n\nFirst answer</s>"],
        ["hm\n</think>\n\nSecond answer</s>"],
    ]
    assert text(tok, rows[0]).endswith("<assistant><think>\n\n</think>\n\nFirst answer</s>")
    assert text(tok, rows[1]).count("<think>") == 1, "a thought opened by the prompt is not opened again"
    lines = "\n".join(tok.lines())
    assert "one row per answer for 1 conversation:" in lines
    assert "training 1 answer after an empty" in lines


def test_tools_and_calls_are_rendered_and_learned(tokeniser: Callable[..., Tokeniser]) -> None:
    tok = tokeniser()
    answer = Turn("assistant", "Let me look.", {"tool_calls": [CALL]})
    (row,) = tok.rows([Record(QUESTION, "Let me look.", answer=answer, tools=(TOOL,))])
    assert text(tok, row).startswith("TOOLS [{")
    assert learned(tok, row) == ['Let me look.CALL stock {"item": "lamp"}</s>']
    whole = (*QUESTION, answer, Turn("tool", "7 lamps"))
    (row,) = tok.rows([Record(whole, "Seven.", tools=(TOOL,))])
    assert learned(tok, row) == ['Let me look.CALL stock {"item": "lamp"}</s>', "Seven.</s>"]
    assert "<tool>7 lamps</s>" in text(tok, row)


@pytest.mark.parametrize(
    ("record", "what"),
    [
        (Record(QUESTION, "x", tools=(TOOL,), where="a.jsonl:3"), "it does not show tools"),
        (
            Record(QUESTION, "x", answer=Turn("assistant", "x", {"tool_calls": [CALL]}), where="a.jsonl:3"),
            "it does not show the answer's tool calls",
        ),
        (
            Record((*QUESTION, Turn("assistant", "x", {"tool_calls": [CALL]})), "y", where="a.jsonl:3"),
            "it does not show tool calls",
        ),
        (Record((*QUESTION, Turn("tool", "7")), "y", where="a.jsonl:3"), "it does not show tool results"),
    ],
)
def test_a_template_without_tools_is_refused_with_the_row(
    tokeniser: Callable[..., Tokeniser], record: Record, what: str
) -> None:
    silent = (
        "{% for m in messages %}{% if m.role in 'user assistant' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(
        DataError, match="a.jsonl:3: the base's chat template cannot render this row: " + what
    ):
        tokeniser(silent).rows([record])


def test_a_template_error_names_client_file_and_row(
    tokeniser: Callable[..., Tokeniser],
) -> None:
    tok = tokeniser(
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system turn here') }}{% endif %}x"
    )
    row = Record((Turn("system", "Be."), *QUESTION), "x", where="rows.jsonl:4")
    with pytest.raises(DataError, match=r"client ulm: rows\.jsonl:4: .*: No system turn here$"):
        load_rows(tok, {"bern": [Record(QUESTION, "x")], "ulm": [Record(QUESTION, "x"), row]})


def test_turns_that_a_template_hides_are_reported(tokeniser: Callable[..., Tokeniser]) -> None:
    silent = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    tok = tokeniser(silent)
    tok.rows([Record((Turn("system", "Be."), *QUESTION), "x", where="rows.jsonl:4"), Record(QUESTION, "x")])
    assert next(line for line in tok.lines() if "system turn" in line).startswith(
        "the chat template does not show the system turns of 1 row (first: rows.jsonl:4)"
    )


def test_names_and_thoughts_that_a_template_hides_are_reported_or_refused(
    tokeniser: Callable[..., Tokeniser],
) -> None:
    asked = (Turn("user", "One?", {"name": "Ann"}), Turn("assistant", "First", {"reasoning": "hm"}), CHAT[2])
    record = Record(asked, "Second", where="rows.jsonl:4")
    with pytest.raises(
        DataError, match=r"rows.jsonl:4: .* does not show the answer's tool calls or thoughts"
    ):
        tokeniser().rows([record])
    tok = tokeniser(last=True)
    tok.rows([record])
    assert [line.partition(" (first: rows.jsonl:4)")[0] for line in tok.lines()] == [
        "the chat template does not show the name of user turns of 1 row",
        "the chat template does not show the reasoning of assistant turns of 1 row",
    ]
    tok = tokeniser("{% for m in messages %}{{ m.name }}{{ m.reasoning }}{{ m.content }}{% endfor %}")
    (row,) = tok.rows([record])
    assert tok.lines() == [] and learned(tok, row)[0].startswith("hmFirst")


def test_long_rows_are_cut_to_the_limit_and_reported(tokeniser: Callable[..., Tokeniser]) -> None:
    tok = tokeniser(max_length=40)
    long = "lamp " * 100
    rows = tok.rows([
        Record((Turn("user", long),), "short"),
        Record(QUESTION, long),
        Record(QUESTION, "short"),
    ])  # fmt: skip
    assert [len(row.ids) for row in rows[:2]] == [40, 40] and len(rows[2].ids) < 40
    assert learned(tok, rows[0]) == ["short</s>"], "the answer is not cut"
    (answer,) = learned(tok, rows[1])
    assert "</s>" not in answer and long.startswith(answer.strip()), "a cut answer has no end token"
    assert [(row.cuts_prompt, row.cuts_answer) for row in rows] == [
        (True, False),
        (True, True),
        (False, False),
    ]
    (line,) = tok.lines()
    longest = max(row.length for row in rows)
    assert line.startswith(
        "longer than train.max_length = 40 tokens: 2 of 3 rows; prompts that lose their beginning: 2, "
        "answers that lose their end and end token: 1;"
    )
    assert f"{longest} would hold 100%" in line
    assert "the base's context length = 30" in "".join(positions_lines(tokeniser, long))


def positions_lines(tokeniser: Callable[..., Tokeniser], long: str) -> list[str]:
    tok = tokeniser(max_length=40, positions=30)
    assert len(tok.rows([Record(QUESTION, long)])[0].ids) == 30
    return tok.lines()


@given(st.integers(0, 60), st.integers(0, 60), st.integers(16, 64))
def test_cut_rows_fill_the_limit_and_answers_have_priority(
    tokeniser: Callable[..., Tokeniser], num_prompt: int, num_answer: int, limit: int
) -> None:
    record = Record((Turn("user", "a" + " lamp" * num_prompt),), " lamp" * num_answer)
    (whole,), (row,) = tokeniser().rows([record]), tokeniser(max_length=limit).rows([record])
    assert row.length == len(whole.ids) == whole.length
    assert len(row.ids) == min(limit, whole.length)
    num = int(whole.learned.sum())
    assert (row.ids[-1] == whole.ids[-1]) == (num < limit), "only an uncut answer has its end token"
    if num < limit:
        assert row.ids.tolist() == whole.ids[-len(row.ids) :].tolist()
    else:
        kept = int(row.learned.sum())
        assert limit - kept > 0 and row.ids[-kept:].tolist() == whole.ids[whole.learned][:kept].tolist()


def test_rows_are_tokenised_once(
    tokeniser: Callable[..., Tokeniser], monkeypatch: pytest.MonkeyPatch
) -> None:
    tok = tokeniser()
    records = [Record(QUESTION, "x")]
    first = tok.rows(records)
    monkeypatch.setattr(tok, "_tokenise", lambda _: pytest.fail("again"))
    assert tok.rows(records)[0] is first[0]


def test_a_greeting_before_the_first_question_is_context(tokeniser: Callable[..., Tokeniser]) -> None:
    tok = tokeniser()
    greeting = Turn("assistant", "Welcome.", learned=False)
    (row,) = tok.rows([Record((greeting, *QUESTION), "The red one.")])
    assert text(tok, row).startswith("<assistant>Welcome.</s>")
    assert learned(tok, row) == ["The red one.</s>"]
