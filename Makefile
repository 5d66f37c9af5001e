# `make demo` and `make test` are complete on a fresh machine: the environment is a target like any other.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# Densities of a few numbers are faster on one thread, and on a busy machine two threads wait for each other.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format bench clean

help:
	@echo "make demo        sample two real posteriors and three benchmark densities, figures in results/demo"
	@echo "make test        the tests that take seconds"
	@echo "make test-slow   the statistical tests that take minutes"
	@echo "make lint        ruff and mypy"
	@echo "make format      rewrite the sources in the project's format"
	@echo "make bench       training speed against a straightforward loop"
	@echo "make clean       remove the environment, caches and results"

# Installed anew only when the requirements change: an interrupted installation leaves no stamp.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $@

.venv: $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m diffsampler demo --out results/demo

test: $(STAMP)
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --timeout 1800

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python experiments/bench_training.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks build dist *.egg-info results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
