# make demo   train three adapters on the base that ships with lowrank, in about two minutes
# make board  everything in a browser (the board), for people who do not write code
# make test   run the tests, and say which twenty took longest (PYTEST_ARGS=--cpu-durations=60: processor time, by folder)
# Workers of one thread each, a core and 3 GB of memory for each (WORKERS=2: so many); threads that wait for one another
# on shared cores cost more than they bring.
# make rehearse   the GPU path without a GPU: a CUDA build of torch (about 3 GB) in .venv-rehearsal, and tensors without memory
# Each makes its own environment in .venv; nothing else on the machine is touched.

PYTHON ?= python3
VENV := .venv
CLIENTS := .venv-clients
REHEARSAL := .venv-rehearsal
REHEARSAL_TORCH ?= torch>=2.12,<2.14
BIN := $(VENV)/bin
PYTEST_ARGS ?=
WORKERS ?= $(shell $(PYTHON) tests/workers.py)
SHARED_DATA ?=

.PHONY: demo board test suite test-slow test-gpu test-clients rehearse check lint types clean

demo: $(VENV)/.core
	$(BIN)/lowrank demo

board: $(VENV)/.board
	$(BIN)/lowrank board

# Types are checked beside the tests: a minute of one core, which would wait.
test: lint
	$(MAKE) --no-print-directory -j 2 types suite

suite: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not gpu and not clients" --durations=20 $(if $(SHARED_DATA),--shared-data=$(SHARED_DATA)) $(PYTEST_ARGS)

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow --timeout=3600 $(if $(SHARED_DATA),--shared-data=$(SHARED_DATA)) $(PYTEST_ARGS)

test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

test-clients: $(VENV)/.test $(CLIENTS)/.made
	$(BIN)/python -m pytest -m clients tests/serve/test_clients.py $(PYTEST_ARGS)

# A dozen minutes of processor time. `no_device.c` answers what torch asks a driver; no test runs on a card, if there is one.
rehearse: $(REHEARSAL)/.made
	LOWRANK_REHEARSAL=1 LD_PRELOAD=$(CURDIR)/$(REHEARSAL)/libcuda.so.1 OMP_NUM_THREADS=1 \
	  $(REHEARSAL)/bin/python -m pytest tests/rehearsal --timeout=1200 $(PYTEST_ARGS)

check: lint types

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_dead_code.py

types: $(VENV)/.test
	$(BIN)/pyright

$(VENV)/.core: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e .
	touch $@

$(VENV)/.board: $(VENV)/.core
	$(BIN)/pip install --quiet -e '.[board]'
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(BIN)/pip install --quiet -e '.[test]'
	touch $@

# The clients want other packages than we do, so they have an environment of their own. Needs node and npm.
$(CLIENTS)/.made: tests/serve/clients/requirements.txt tests/serve/clients/package.json
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet -r tests/serve/clients/requirements.txt
	mkdir -p $(CLIENTS)/node && cp tests/serve/clients/package.json $(CLIENTS)/node/
	npm install --silent --no-audit --no-fund --prefix $(CLIENTS)/node
	touch $@

# On Linux the index's own torch is a CUDA build; where pip is told of another one, say so: PIP_FIND_LINKS= PIP_CONFIG_FILE=/dev/null
$(REHEARSAL)/.made: pyproject.toml tests/rehearsal/no_device.c
	$(PYTHON) -m venv $(REHEARSAL)
	$(REHEARSAL)/bin/pip install --quiet --upgrade pip
	$(REHEARSAL)/bin/pip install --quiet '$(REHEARSAL_TORCH)'
	$(REHEARSAL)/bin/python -c "import sys, torch; sys.exit(None if torch.version.cuda else 'make rehearse: this torch (' + torch.__version__ + ') is no CUDA build; name one in REHEARSAL_TORCH')"
	$(REHEARSAL)/bin/pip install --quiet -e '.[bnb,optimizers]' pytest pytest-timeout pytest-xdist
	$(CC) -shared -fPIC -O1 -Wl,-soname,libcuda.so.1 -o $(REHEARSAL)/libcuda.so.1 tests/rehearsal/no_device.c
	touch $@

clean:
	rm -rf $(VENV) $(CLIENTS) $(REHEARSAL) build dist *.egg-info
