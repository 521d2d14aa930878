# Every target makes the environment that it needs; a stamp file per set of dependencies keeps repeated runs quick.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
INSTALL = $(PYTHON) -m pip --python $(BIN)/python install --quiet --editable
WORKLOAD ?= examples/few_busy.yaml
CALIBRATION ?= llama-3.1-8b-instruct-h100-64gb
MEASUREMENTS ?= ../shared/measurements
MODELS := llama-3.1-8b-instruct qwen-2.5-7b-instruct

.PHONY: help recommend test test-all fuzz kills vllm tutorial docs-code browser dev format lint types imports docs package \
	calibrations surrogates clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

recommend: $(VENV)/.base ## Recommend A and S for WORKLOAD on CALIBRATION
	$(BIN)/lora-capacity optimize $(WORKLOAD) --calibration $(CALIBRATION)

test: $(VENV)/.test ## Run the tests but the slow ones, as many at once as there are cores, four at most
	$(PYTEST) -m "not (slow or vllm or browser or docs)" $(PYTEST_ARGS)

test-all: test ## Run the tests, then the slow ones
	$(PYTEST) -m "slow and not (vllm or browser or docs)" $(PYTEST_ARGS)

# Servers start alone: their tests look for what is left behind on the whole machine.
vllm: $(VENV)/.test ## Compare with vLLM's own scheduler, and drive a real server (4 GB, minutes)
	PYTHON=$(PYTHON) tests/vllm/make_environment.sh
	LORA_CAPACITY_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python \
		$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal -m vllm tests/vllm
	LORA_CAPACITY_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest -m vllm tests/unit

# Three pages at once even on two cores: some wait for servers.
# RECORD=docs/data/trust.json keeps the counts of this and the next for the Trust page (docs/generate_trust.py).
fuzz: $(VENV)/.test ## Read damaged files and run damaged commands by the thousand (INPUTS=20000, SEED=0; minutes)
	$(BIN)/python -m tests.fuzz --inputs $(or $(INPUTS),20000) --seed $(or $(SEED),0) $(if $(RECORD),--record $(RECORD))

kills: $(VENV)/.test ## Kill long commands and run them again (KILLS=42, SEED=0; half an hour)
	$(BIN)/python -m tests.fuzz.kills --kills $(or $(KILLS),42) --seed $(or $(SEED),0) $(if $(RECORD),--record $(RECORD))

docs-code: $(VENV)/.dev ## Run the code of the documentation (UPDATE=1 writes into it what the code prints)
	LORA_CAPACITY_UPDATE_DOCS=$(UPDATE) $(BIN)/python -m pytest --numprocesses=3 --dist=worksteal -m docs tests/docs

browser: $(VENV)/.browser docs ## Test the documentation and a report in Chromium (screenshots in build/screenshots)
	$(BIN)/python -m pytest -m browser tests/browser

tutorial: $(VENV)/.base ## Follow the tutorial on vLLM's CPU build into build/tutorial (4 GB, a quarter of an hour)
	PYTHON=$(PYTHON) tests/vllm/make_environment.sh
	rm -rf build/tutorial
	PATH="$(CURDIR)/$(BIN):$$PATH" LORA_CAPACITY_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python \
		$(BIN)/python docs/run_page.py docs/tutorials/profile-and-verify.md build/tutorial

dev: $(VENV)/.dev ## Install everything that the targets below need

format: $(VENV)/.dev ## Rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(VENV)/.dev ## Check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev ## Check types, strictly in the library
	$(BIN)/mypy --strict src
	$(BIN)/mypy --no-warn-unused-ignores profiling cli tests

imports: $(VENV)/.test ## Check which module may import which
	$(BIN)/lint-imports --no-cache

docs: $(VENV)/.dev ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

package: $(VENV)/.dev ## Build sdist and wheel into dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

calibrations: $(VENV)/.base ## Fit the bundled calibrations anew to the tables in MEASUREMENTS
	for model in $(MODELS); do \
		$(BIN)/lora-capacity fit $(MEASUREMENTS) --model $$model --runs $(MEASUREMENTS)/serving_runs.csv \
			-o src/lora_capacity/calibration/bundled/$$model-h100-64gb.json || exit 1; \
	done

surrogates: $(VENV)/.base ## Label workloads and train the bundled surrogates anew (minutes each)
	mkdir -p build
	for name in $(MODELS:%=%-h100-64gb); do \
		$(BIN)/lora-capacity label --calibration $$name --workloads 4096 -o build/$$name.parquet || exit 1; \
		$(BIN)/lora-capacity train build/$$name.parquet -o src/lora_capacity/surrogate/bundled/$$name.json || exit 1; \
	done

clean: ## Remove environments and everything built
	rm -rf $(VENV) .venv-vllm build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || $(PYTHON) -m venv --clear --without-pip $(VENV)

$(VENV)/.base: pyproject.toml | $(BIN)/python
	$(INSTALL) .
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(INSTALL) '.[test]'
	@touch $(VENV)/.base $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(INSTALL) '.[dev]'
	@touch $(VENV)/.base $(VENV)/.test $@

$(VENV)/.browser: $(VENV)/.dev
	$(INSTALL) '.[browser]'
	@touch $@
