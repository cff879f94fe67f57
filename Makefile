# `make quickstart` and `make test` need nothing but Python 3.11 or newer and a network to install from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test test-fast check clean

quickstart: $(STAMP) ## install, run a small study on real digits, show the best run
	$(BIN)/dpsink-tune sweep experiments/studies/quickstart.yaml
	$(BIN)/dpsink-analysis best quickstart

test: $(STAMP) check ## everything; what needs the whole machine comes last, by itself
	$(BIN)/pytest -n 2 --dist loadfile -m "not alone"
	$(BIN)/pytest -m alone

test-fast: $(STAMP) check ## daily work: without the slow tests
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not alone"

check: $(STAMP) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(STAMP): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
