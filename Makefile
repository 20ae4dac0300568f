# Each target installs what it needs. `make demo` trains and evaluates a model; `make test` runs the whole test suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_RUN := runs/quickstart
# One more than there are cores, because many tests wait for other processes.
TEST_WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)

.PHONY: help demo test check docs examples clean

help:
	@echo "make demo   install, train the quickstart model, evaluate it, generate a sample"
	@echo "make test   install, run the test suite"
	@echo "make check  install, run the linters, the type checker and the import contracts"
	@echo "make docs   install, build the documentation in build/site"
	@echo "make examples  run every command that the documentation shows and update its output (takes half an hour)"
	@echo "make clean  remove $(VENV) and all build output"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e . -c constraints.txt
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	@touch $@

demo: $(VENV)/installed
	$(BIN)/tinylm train quickstart --out $(DEMO_RUN) --overwrite
	$(BIN)/tinylm eval --run $(DEMO_RUN)
	$(BIN)/tinylm sample --run $(DEMO_RUN) --prompt "This module provides" --max-new-tokens 120 --seed 1
	@echo
	@echo "The model is in $(DEMO_RUN). Next:"
	@echo "  $(BIN)/tinylm sample --run $(DEMO_RUN) --prompt \"Return a new list\""
	@echo "  $(BIN)/tinylm new my-text.txt --minutes 10 --out my.yaml   # your own text, then: $(BIN)/tinylm train my.yaml"
	@echo "  $(BIN)/tinylm --help"

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy tinylm cli
	$(BIN)/lint-imports

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]" -c constraints.txt
	@touch $@

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

examples: $(VENV)/installed-dev
	$(BIN)/python docs/scripts/run_examples.py

clean:
	rm -rf $(VENV) build dist *.egg-info
