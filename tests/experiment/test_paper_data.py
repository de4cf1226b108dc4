"""Rows of the paper's data sets become prompts without an instruction sentence."""

import importlib.util
from pathlib import Path

FILE = Path(__file__).parents[2] / "scripts" / "paper_data.py"
spec = importlib.util.spec_from_file_location("paper_data", FILE)
assert spec and spec.loader
paper_data = importlib.util.module_from_spec(spec)
spec.loader.exec_module(paper_data)


def test_rows_take_their_form() -> None:
    qqp = [{"question1": "Is it?", "question2": "Is it so?", "label": n} for n in (1, 0)]
    assert [r["response"] for r in paper_data.rows_of("paraphrase", qqp, paper_data.paraphrase, 5)] == [
        "Yes",
        "No",
    ]
    triples = {"mtriple_set": [["a | b | c", "a | d | e"]]}
    webnlg = {"modified_triple_sets": triples, "lex": {"text": ["A bs c."]}}
    assert paper_data.data_to_text(webnlg) == ("a | b | c , a | d | e", "A bs c.")


def test_rows_without_an_answer_do_not_count() -> None:
    rows = [
        {"document": "a", "summary": " "},
        {"document": "b", "summary": "B"},
        {"document": "c", "summary": "C"},
    ]
    found = list(paper_data.rows_of("headline", rows, paper_data.headline, 1))
    assert found == [{"instruction": "b", "response": "B", "task": "headline"}]
