VENV := .venv
PYTHON_IN_VENV := $(VENV)/bin/python
SETUP := $(VENV)/.ready
SOURCES := fedrouter tests benchmarks scripts

.DEFAULT_GOAL := help
.PHONY: help setup demo test check hostile lint types clean

help:  ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | expand -t 14

setup: $(SETUP)  ## Make .venv with the pinned packages (the other targets do it when needed)

$(SETUP): requirements/cpu.txt requirements/install.sh pyproject.toml
	@requirements/install.sh $(VENV)
	@touch $@

demo: export HF_HUB_OFFLINE = 1
demo: $(SETUP)  ## Train the built-in federation, serve it with vLLM, evaluate it through the endpoint
	@$(PYTHON_IN_VENV) -m fedrouter demo

# One thread: several small models run side by side, and more threads than cores slow vLLM's CPU backend down.
test: export HF_HUB_OFFLINE = 1
test: export OMP_NUM_THREADS = 1
test: $(SETUP)  ## Run the whole test suite, real vLLM last
	$(PYTHON_IN_VENV) -m pytest

lint: $(SETUP)  ## Check format and lint
	$(PYTHON_IN_VENV) -m ruff format --check $(wildcard $(SOURCES))
	$(PYTHON_IN_VENV) -m ruff check $(wildcard $(SOURCES))

types: $(SETUP)  ## Check types, strictly
	$(PYTHON_IN_VENV) -m mypy

hostile: export HF_HUB_OFFLINE = 1
hostile: export OMP_NUM_THREADS = 1
hostile: $(SETUP)  ## Ask a real server 10,000 hostile requests; slow bodies and broken streams beside normal ones
	$(PYTHON_IN_VENV) scripts/hostile.py

check: lint types test  ## What CI runs: format, lint, types, tests

clean:  ## Remove .venv, caches and build outputs; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find fedrouter tests -name __pycache__ -type d -prune -exec rm -rf {} +
