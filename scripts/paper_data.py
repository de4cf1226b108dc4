"""The paper's four data sets from the Hugging Face hub, as JSON Lines: python scripts/paper_data.py OUT

QQP, Gigaword, SAMSum and WebNLG, cut as the paper cuts them: enough for 8 clients of 600 train rows each, and
300 test rows a task. Prompts carry the bare input, no instruction sentence. Needs a network.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

TRAIN, TEST = 8 * 600, 300
Row = Mapping[str, Any]


def paraphrase(row: Row) -> tuple[str, str]:
    """Return QQP's prompt and answer."""
    return f"{row['question1']} - {row['question2']}", "Yes" if row["label"] == 1 else "No"


def headline(row: Row) -> tuple[str, str]:
    """Return Gigaword's."""
    return row["document"], row["summary"]


def dialogue_summary(row: Row) -> tuple[str, str]:
    """Return SAMSum's."""
    return row["dialogue"], row["summary"]


def data_to_text(row: Row) -> tuple[str, str]:
    """Return WebNLG's: triples as they are written in the paper's code, the first text."""
    triples = row["modified_triple_sets"]["mtriple_set"][0]
    return " , ".join(triples), row["lex"]["text"][0] if row["lex"]["text"] else ""


# task: (hub id, configuration, revision, train split, test split, row to prompt and answer)
SOURCES: dict[str, tuple[str, str | None, str | None, str, str, Callable[[Row], tuple[str, str]]]] = {
    "paraphrase": ("nyu-mll/glue", "qqp", None, "train", "validation", paraphrase),
    "headline": ("Harvard/gigaword", None, "refs/convert/parquet", "train", "test", headline),
    "dialogue_summary": ("knkarthick/samsum", None, None, "train", "test", dialogue_summary),
    "data_to_text": ("web_nlg", "release_v3.0_en", "refs/convert/parquet", "train", "dev", data_to_text),
}


def rows_of(
    task: str, rows: Any, form: Callable[[Row], tuple[str, str]], num: int
) -> Iterator[dict[str, str]]:
    """Yield the first ``num`` rows that have a prompt and an answer."""
    for row in rows:
        prompt, answer = (text.strip() for text in form(row))
        if prompt and answer and num > 0:
            num -= 1
            yield {"instruction": prompt, "response": answer, "task": task}


def main(out: Path) -> None:
    """Write eight files."""
    from datasets import load_dataset

    out.mkdir(parents=True, exist_ok=True)
    for task, (name, configuration, revision, train, test, form) in SOURCES.items():
        for part, split, num in (("train", train, TRAIN), ("test", test, TEST)):
            found = load_dataset(name, configuration, split=split, revision=revision).shuffle(seed=0)
            lines = [json.dumps(row, ensure_ascii=False) for row in rows_of(task, found, form, num)]
            (out / f"{task}.{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(f"{task}.{part}: {len(lines)} rows")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
