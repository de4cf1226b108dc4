"""The paper's evaluation: methods × scenarios × seeds over several worlds, as a grid of cells.

settings.py   the configuration file: worlds, methods, scenarios, seeds, what is searched
grid.py       from settings to cells, and from a cell to the configuration that it trains with
cell.py       one cell: train, decide, answer, score; a line of results
engine.py     who answers: transformers in this process, or one vLLM for all cells
compose.py    adapters merged for prompts of no task cluster
results.py    lines of results, on disk and by cell
run.py        all cells, side by side; gone on with where they stopped
compare.py    means over seeds, the best baseline, paired bootstrap
tables.py     Markdown, LaTeX, CSV
pictures.py   the paper's figures as SVG
report.py     all of it as one page, and the paper's claims beside what was measured
"""

from fedrouter.experiment.run import run_experiment
from fedrouter.experiment.settings import load_experiment

__all__ = ["load_experiment", "run_experiment"]
