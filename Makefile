# Each target sets up what it needs: `make profile` and `make test` work in a fresh clone.
# Another interpreter: `make PYTHON=python3.12 profile`. A CUDA build of torch: `make TORCH='torch==2.13.0+cu130' profile`.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PROFILE_ARGS ?=
PYTEST_ARGS ?= -n auto --maxprocesses 8
DYNAMICS := 0,100,250,500,1000,1500,2000,2500

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq --constraint constraints.txt
RUN_STAMP := $(VENV)/.ready-run
DEV_STAMP := $(VENV)/.ready-dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help bench notebooks pages reports profile test lint typecheck unit format setup setup-dev clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

profile: $(RUN_STAMP)  ## Profile the bundled checkpoint, offline
	HF_HUB_OFFLINE=1 $(BIN)/sinklens profile $(PROFILE_ARGS)

# All three run even if one fails, so that one look at the log shows everything there is to mend.
test: $(DEV_STAMP)  ## Format, lint, types and all tests
	@failed=; for step in lint typecheck unit; do \
	  $(MAKE) --no-print-directory $$step || failed="$$failed $$step"; done; \
	if [ -n "$$failed" ]; then echo "Failed:$$failed" >&2; exit 1; fi

lint: $(DEV_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

typecheck: $(DEV_STAMP)
	$(BIN)/basedpyright

unit: $(DEV_STAMP)
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest $(PYTEST_ARGS)

format: $(DEV_STAMP)  ## Rewrite the code in the house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(RUN_STAMP)  ## The environment for users, with TransformerLens, nnsight and Jupyter

setup-dev: $(DEV_STAMP)  ## ... and the tools for developers

clean:  ## Remove the environment and all caches
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "sinklens needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing)." >&2; \
	  echo "Try: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch goes first and by name, so that a build chosen with TORCH (or found in a local folder) is not replaced.
$(RUN_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV) (torch, transformers, TransformerLens, nnsight, Jupyter); this happens once."
	$(PIP) '$(TORCH)'
	$(PIP) --editable '.[transformer-lens,nnsight,notebook]'
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	$(PIP) --editable '.[dev]'
	@touch $@

bench: $(RUN_STAMP)  ## The whole benchmark suite: ratios, plot, docs/performance.md (half an hour)
	$(BIN)/python -m benchmarks

notebooks: $(RUN_STAMP)  ## Run the notebooks in notebooks/ again and keep their results
	HF_HUB_OFFLINE=1 $(BIN)/python notebooks/run.py

pages: $(RUN_STAMP)  ## Write the generated pages of docs/ from the code again
	$(BIN)/python docs/generate.py

reports: $(RUN_STAMP)  ## Make the example reports in reports/ again; trains the testbed once, some minutes
	for name in dense-ind moe-ind vlm-shapes; do \
	  HF_HUB_OFFLINE=1 $(BIN)/sinklens profile -q --verify --sensitivity -m bundled:$$name --out runs/example-$$name --force && \
	  cp runs/example-$$name/report.html reports/$$name.html || exit 1; \
	done
	[ -f runs/dynamics/model.safetensors ] || \
	  $(BIN)/sinklens testbed train dense-ind --steps $(DYNAMICS) --out runs/dynamics
	for step in $$(echo $(DYNAMICS) | tr , ' '); do \
	  HF_HUB_OFFLINE=1 $(BIN)/sinklens profile -q --no-verify -m runs/dynamics/step-$$step --prompts runs/dynamics/sinklens_prompts.jsonl \
	    --out runs/dynamics/run/step-$$step --force || exit 1; \
	done
	$(BIN)/sinklens compare runs/dynamics/run/step-* --out reports/dynamics.html
