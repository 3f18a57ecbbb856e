# Everything runs in .venv, which the first target makes. `make PYTHON=python3.12 test` takes another Python.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m

.PHONY: demo test test-slow lint format types bench docs clean

demo: $(VENV)/.core
	$(BIN)/lowdim demo

test: $(VENV)/.dev
	$(RUN) pytest -n auto

test-slow: $(VENV)/.dev
	$(RUN) pytest -n auto -m slow

lint: $(VENV)/.dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .

format: $(VENV)/.dev
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

types: $(VENV)/.dev
	$(RUN) pyright --pythonpath $(BIN)/python

bench: $(VENV)/.dev
	$(RUN) benchmarks --size smoke --out results/bench

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

clean:
	rm -rf $(VENV) site results build dist

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.core: pyproject.toml $(VENV)/.venv
	$(RUN) pip install --quiet --disable-pip-version-check -e '.[plots,data]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.venv
	$(RUN) pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

$(VENV)/.docs: pyproject.toml $(VENV)/.venv
	$(RUN) pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@
