"""Make docs/results.md, its pictures and README's table from the committed results.

python scripts/results_page.py [--check]

With --check nothing is written; the exit code says whether the pages are what the results make of them.
Results are the lines of benchmarks/results/paper_small/*.jsonl, as `fedrouter experiment` writes them; the
words between the tables are notes.md beside them.
"""

import sys
import tempfile
from pathlib import Path

from fedrouter.experiment import load_experiment
from fedrouter.experiment.compare import Results
from fedrouter.experiment.report import claims, draw
from fedrouter.experiment.results import Line, read_results
from fedrouter.experiment.tables import summary, tables

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "results" / "paper_small"
PAGE, README, PICTURES = ROOT / "docs" / "results.md", ROOT / "README.md", ROOT / "docs" / "results"
BEGIN, END = "<!-- results: made by scripts/results_page.py -->", "<!-- /results -->"
CAPTIONS = {
    "tasks": "Figure 3: methods × tasks, single, scored on all tasks",
    "map": "Figure 4: clients' prompts as the embedder sees them, t-SNE; a colour a task",
    "sizes": "Figure 5: score over the size of the base",
    "loss": "validation loss over rounds (a method's own adapters on its own clients' rows)",
    "curve": "score over rounds",
    "bytes": "what travels in a round",
}


def main(check: bool) -> int:
    """Write or compare; return the exit code."""
    settings = load_experiment(ROOT / "examples" / "paper_small.toml")
    lines: dict[str, Line] = {}
    for file in sorted(KEPT.glob("*.jsonl")):
        lines |= read_results(file)
    results = Results(lines.values())
    with tempfile.TemporaryDirectory() as scratch:
        drawn = draw(settings, results, Path(scratch))
        pages = {
            PICTURES / f"{name}.svg": (Path(scratch) / f"{name}.svg").read_text("utf-8") for name in drawn
        }
    searched = [line for line in lines.values() if "loss" in line]
    parts = [
        "# Results",
        "Made by `scripts/results_page.py` from `benchmarks/results/paper_small/`, never typed; "
        "the words before the tables are `notes.md` there.",
        (KEPT / "notes.md").read_text("utf-8").strip(),
        told(results),
    ]
    for table in (claims(settings, results), *tables(settings, results, searched)):
        parts += [f"## {table.title}", table.markdown()]
    parts.append("## Pictures")
    for name in drawn:
        kind = name.rpartition("-")[2]
        parts.append(f"![{name}](results/{name}.svg)\n\n*{name}: {CAPTIONS[kind]}*")
    pages[PAGE] = "\n\n".join(parts) + "\n"
    short = summary(settings, results, "english-6m")
    before, _, rest = README.read_text("utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        sys.exit(f"{README} lacks the lines {BEGIN} and {END}")
    pages[README] = (
        f"{before}{BEGIN}\n{short.title}, mean ± std over seeds:\n\n{short.markdown()}\n{END}{after}"
    )
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text("utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'not what the results make of it' if check else 'written'}")
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(pages[path], encoding="utf-8")
    return int(check and bool(stale))


def told(results: Results) -> str:
    """Say what is there and what made it."""
    cells: dict[str, dict[str, set[int]]] = {}
    for line in results.lines:
        cells.setdefault(line["world"], {}).setdefault(line["scenario"], set()).add(line["seed"])
    parts = [
        f"{world}: "
        + ", ".join(f"{s} with {len(seeds)} seed{'s' * (len(seeds) > 1)}" for s, seeds in own.items())
        for world, own in cells.items()
    ]
    versions = sorted({f"{n} {v}" for line in results.lines for n, v in line["versions"].items()})
    engines = sorted({line["engine"] for line in results.lines})
    seconds = sum(line["train_seconds"] + line["answer_seconds"] for line in results.lines)
    return (
        f"{len(results.lines)} cells ({'; '.join(parts)}). Answers by {', '.join(engines)}; "
        f"{', '.join(versions)}. "
        f"{seconds / 3600:.1f} hours of cells, many at a time. ± is the standard deviation over seeds; "
        "brackets are 95 % intervals of a paired bootstrap over seeds, then prompts "
        "(`fedrouter/experiment/compare.py`)."
    )


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
