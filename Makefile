# Two environments at most, both made here: .venv for demo and tests, .venv-floor by hand.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ENV = $(VENV)/.installed
DOCS = $(VENV)/.installed-docs

.PHONY: demo test test-floor lint types docs format clean

demo: $(VENV)/.installed-demo
	$(BIN)/tomepass demo

test: $(ENV)
	$(BIN)/pytest -n 2

lint: $(ENV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(ENV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(ENV)
	$(BIN)/mypy

docs: $(DOCS)
	$(BIN)/mkdocs build --strict

# The lowest torch and transformers of the ranges: run by hand before a release.
test-floor:
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/pip install -q -c constraints-floor.txt -e ".[dev]"
	.venv-floor/bin/pytest -n 2

clean:
	rm -rf .venv .venv-floor site build dist

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: $(BIN)/pip pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(ENV): $(BIN)/pip pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

$(DOCS): $(ENV)
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	touch $@
