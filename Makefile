# make demo    the whole way on a phantom data set, into demo_output/
# make test    the tests
# make soak    the long tests: kills at random moments, thousands of cases (hours)
# make check   lint, format, types and tests
# make clean   remove what these made, except .venv
#
# PYTHON=python3.12          another interpreter for .venv
# CONSTRAINTS=               newest versions instead of those in constraints.txt (needed with Python 3.10)
# DEMO_FLAGS="--data FOLDER" flags of nnssl_demo
# TEST_FLAGS="-m 'not slow'" flags of pytest

SHELL := /bin/bash
PYTHON ?= python3
CONSTRAINTS ?= -c constraints.txt
DEMO_FLAGS ?=
TEST_FLAGS ?=
JOBS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test soak check lint clean

demo: $(STAMP)
	@$(BIN)/nnssl_demo -o demo_output $(DEMO_FLAGS)

# one torch thread per worker: more threads than cores make each test several times slower
test: $(STAMP)
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n $(JOBS) $(TEST_FLAGS)

soak: $(STAMP)
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -m soak tests/robustness $(TEST_FLAGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

check: lint test

clean:
	@rm -rf demo_output build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find nnssl tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing the packages into .venv (several GB, takes some minutes) ..."
	@$(PYTHON) -c 'import sys; sys.exit("nnssl needs Python 3.10 or newer: make PYTHON=...") if sys.version_info < (3, 10) else 0'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(CONSTRAINTS) -e ".[dev]"
	@touch $@
	@echo "Installed."
