# Every target sets up what it needs, in $(VENV). See `make help`.

PYTHON ?= python3
VENV ?= .venv
DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
MATRIX ?= 1.6.1 1.7.0 1.8.0 1.9.2
MATRIX_TESTS ?= tests/planner tests/sharding

# cpu or cuda: what the machine has.
ifndef FLAVOUR
FLAVOUR := $(shell if [ -e /dev/nvidia0 ] || nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then echo cuda; else echo cpu; fi)
endif

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install

# A stamp is named after a hash of all that it was made from, so a change asks for another stamp, and a set-up that
# was interrupted has none.
DEPENDENCIES := $(sort $(wildcard requirements/*.txt))
key = $(shell { cat $(1); echo '$(FLAVOUR)' '$(CURDIR)'; $(PYTHON) -VV 2>/dev/null; } | cksum | tr ' ' -)
DEPENDENCIES_STAMP := $(VENV)/.dependencies-$(call key,$(DEPENDENCIES))
PACKAGE_STAMP := $(VENV)/.package-$(call key,$(DEPENDENCIES) setup.cfg pyproject.toml)

# Marks an environment as made here: no other is ever removed.
OURS := $(VENV)/.made-by-make
only-ours = if [ -e '$(VENV)' ] && [ ! -e '$(OURS)' ]; then \
  echo 'error: $(VENV) was not made by this Makefile; move it away, or use another: make VENV=.venv-make' >&2; exit 1; fi

.PHONY: help setup demo bench test matrix lint types clean check-python
.DEFAULT_GOAL := help

help:
	@echo 'make demo    run the demo                           (DEMO_ARGS="...")'
	@echo 'make test    lint, types and tests                  (PYTEST_ARGS="-m \"not slow\" -k store")'
	@echo 'make bench   measure it against named peers         (BENCH_ARGS="--quick --only lookup")'
	@echo 'make matrix  planner and sharding tests on other TorchRecs (MATRIX="1.6.1 1.9.2")'
	@echo 'make lint    ruff: rules and format'
	@echo 'make types   mypy'
	@echo 'make setup   only the environment, in $(VENV)'
	@echo 'make clean   remove the environment and all that was built'
	@echo 'PYTHON=python3.12 picks the interpreter, FLAVOUR=cpu or cuda overrides what was found ($(FLAVOUR)).'

setup: $(PACKAGE_STAMP)

check-python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo 'error: no $(PYTHON) here; install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'error: $(PYTHON) is older than Python 3.10; name a newer one: make PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo 'error: $(PYTHON) cannot make virtual environments, because its venv or ensurepip module is missing;' >&2; \
	  echo 'on Debian and Ubuntu: apt-get install python3-venv; or name another: make PYTHON=/path/to/python3' >&2; exit 1; }

$(DEPENDENCIES_STAMP): | check-python
	@echo 'Setting up $(VENV) ($(FLAVOUR)): a minute, or a few where torch must be downloaded.'
	@$(only-ours)
	rm -rf $(VENV)
	@mkdir -p $(VENV) && touch $(OURS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements/$(FLAVOUR).txt -r requirements/dev.txt
ifeq ($(FLAVOUR),cpu)
	$(PIP) --no-deps -r requirements/torchrec.txt
endif
	@touch $@

$(PACKAGE_STAMP): $(DEPENDENCIES_STAMP)
	@rm -f $(VENV)/.package-*
	$(PIP) --quiet --no-build-isolation --editable .
	@touch $@

demo: setup
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

bench: setup
	$(BIN)/python -m benchmarks.run $(BENCH_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

test: lint types
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Each over the torch and FBGEMM of the environment, as far as they go together.
matrix: setup
	@set -e; for version in $(MATRIX); do \
	  echo "TorchRec $$version"; \
	  test -d .matrix/$$version || $(PIP) --quiet --no-deps --target .matrix/$$version torchrec==$$version; \
	  PYTHONPATH=$(CURDIR)/.matrix/$$version $(BIN)/python -m pytest -q $(MATRIX_TESTS) $(PYTEST_ARGS); \
	done

clean:
	@$(only-ours)
	rm -rf $(VENV) .matrix build dist *.egg-info demo-out bench-out .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.*' -prune -exec rm -rf {} +
