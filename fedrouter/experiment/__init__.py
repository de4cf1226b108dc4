"""The paper's evaluation: methods × scenarios × seeds over several worlds, as a grid of cells.

settings.py   the configuration file: worlds, methods, scenarios, seeds, learning rate search
grid.py       settings → cells, and cell → training configuration
cell.py       one cell: train, route, answer, score → one line of results
engine.py     generation of answers, with transformers in this process or one vLLM for all cells
compose.py    merged adapters for prompts of no task cluster
results.py    lines of results on disk
run.py        all cells in parallel, resumable
compare.py    means over seeds, the best baseline, paired bootstrap
tables.py     Markdown, LaTeX, CSV
pictures.py   the paper's figures
report.py     one page with tables and figures, and the paper's claims compared with the results
"""
