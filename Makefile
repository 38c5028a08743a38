# make demo   install, then edit a handful of facts in the embedded model
# make test   install what the tests need, then run them
# make lint   formatting, lint and types, changing nothing
# make fix    formatting and the lint that can be repaired by itself
# make docs   write the generated pages of docs/
# make bench  speed and memory, as ratios measured in one run

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
WORKERS ?= 2

.PHONY: demo test lint fix docs bench clean
.DEFAULT_GOAL := test

# Two stamps, so that neither target installs twice and the demo installs no test tools.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e .
	touch $@

.venv/.developing: .venv/.installed
	$(PIP) -e '.[dev]'
	touch $@

demo: .venv/.installed
	$(BIN)/errata demo

test: .venv/.developing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: .venv/.developing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: .venv/.developing
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.developing
	$(BIN)/python -m errata.cli.reference docs/cli.md

bench: .venv/.developing
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache
