"""Download the paper's four data sets from the Hugging Face hub: python scripts/paper_data.py OUT

Writes QQP, Gigaword, SAMSum and WebNLG as JSON Lines, in the paper's sizes: enough rows for 8 clients with
600 training rows each, and 300 test rows per task. Prompts are the bare input, without an instruction.
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
    """Return Gigaword's prompt and answer."""
    return row["document"], row["summary"]


def dialogue_summary(row: Row) -> tuple[str, str]:
    """Return SAMSum's prompt and answer."""
    return row["dialogue"], row["summary"]


def data_to_text(row: Row) -> tuple[str, str]:
    """Return WebNLG's prompt, triples as in the paper's code, and answer, the first text."""
    triples = row["modified_triple_sets"]["mtriple_set"][0]
    return " , ".join(triples), row["lex"]["text"][0] if row["lex"]["text"] else ""


# task: (hub id, configuration, revision, train split, test split, row → prompt and answer)
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
    """Write a train and a test file for each task."""
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
