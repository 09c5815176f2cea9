# From Python 3.11, git and make alone: every target first makes .venv, once.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DATA ?= $(or $(VITRAIL_DATA),../shared/data)
CORES ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist worksteal -q
export UV_HTTP_TIMEOUT ?= 600

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check bench bench-families parity costs constraints clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## make .venv with the exact versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "vitrail needs Python 3.11 or newer; give one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@test -x $(BIN)/uv || { $(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null; \
		$(BIN)/python -m pip install --quiet --constraint constraints.txt uv; }
	@echo "installing vitrail into $(VENV) (the first time takes minutes: torch is large)" >&2
	@for try in 1 2 3; do \
		$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt \
			--build-constraint constraints.txt --editable '.[dev,peers]' && exit 0; \
		echo "installation failed; try $$try of 3" >&2; sleep 5; \
	done; exit 1
	@touch $(READY)

demo: $(READY)  ## train a small ViT on digits, evaluate, predict, trace: about two minutes
	@$(BIN)/python -m vitrail demo

test: $(READY)  ## the default tests, in minutes
	@$(PYTEST)

test-slow: $(READY)  ## the slow tests too: kills, long runs
	@$(PYTEST) -m 'slow or not slow'

check: $(READY)  ## format, lint and strict types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy

bench: $(READY)  ## measured tables beside peers: training, data path, engines, latency, files, cold start
	@$(BIN)/python benchmarks/cpu_train.py
	@$(BIN)/python benchmarks/data_path.py $(DATA)/imagenette/train-0.zip $(DATA)/photos/imagenet-30.zip
	@$(BIN)/python benchmarks/engines.py --products
	@$(BIN)/python benchmarks/engines.py --keep $(VENV)/bench --engines torch onnxruntime openvino int8
	@$(BIN)/python benchmarks/engines.py --keep $(VENV)/bench --batch-size 1 --engines torch onnxruntime openvino int8
	@$(BIN)/python benchmarks/engines.py --files $(DATA)/photos/imagenet-30.zip --models vit_small_patch16_224
	@$(BIN)/python benchmarks/engines.py --cold --rounds 3

bench-families: $(READY)  ## engines on one network of each family, peers compiled too: ten minutes
	@$(BIN)/python benchmarks/engines.py --table --keep $(VENV)/bench --peer-modes eager compiled

parity: $(READY)  ## a table of every family beside its references, for the same weights
	@$(PYTEST) --parity

costs: $(READY)  ## count parameters and FLOPs of every network anew, for vitrail models
	@$(BIN)/python -c 'from vitrail.jobs.models import write_table; write_table()'

constraints: $(READY)  ## renew constraints.txt from pyproject.toml
	@printf 'hatchling\neditables\nuv\n' | $(BIN)/uv pip compile --quiet --all-extras --no-header --no-annotate \
		--no-emit-index-url --python-version 3.11 --upgrade pyproject.toml - -o $(VENV)/constraints.txt
	@{ grep '^#' constraints.txt; cat $(VENV)/constraints.txt; } > $(VENV)/new.txt && mv $(VENV)/new.txt constraints.txt

clean:  ## remove what the targets made, .venv too
	@rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
