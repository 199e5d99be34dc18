# make demo   train three adapters on the base that ships with lowrank, in about two minutes
# make test   run the tests
# Two workers of one thread each: threads that wait for one another on shared cores cost more than they bring.
# Each makes its own environment in .venv; nothing else on the machine is touched.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
SHARED_DATA ?=

.PHONY: demo test test-slow test-gpu check clean

demo: $(VENV)/.core
	$(BIN)/lowrank demo

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu" $(if $(SHARED_DATA),--shared-data=$(SHARED_DATA)) $(PYTEST_ARGS)

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow --timeout=3600 $(if $(SHARED_DATA),--shared-data=$(SHARED_DATA)) $(PYTEST_ARGS)

test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

$(VENV)/.core: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e .
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(BIN)/pip install --quiet -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
