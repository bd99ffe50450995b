# Everything runs from the environment in .venv, made on first use and renewed when pyproject.toml or constraints.txt change.
# `make PYTHON=python3.12` chooses the interpreter. pip's own settings apply (PIP_EXTRA_INDEX_URL and the like): where CPU builds of torch
# live in an index of their own, name it there, and no CUDA build is downloaded.

PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROTOS := $(wildcard proto/gpumarket/v1/*.proto)

.PHONY: help env demo test test-all lint format bench proto contracts clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       the whole market on this machine: advertise, match, execute, verify, settle"
	@echo "make test       ruff, mypy and every test that takes less than a minute"
	@echo "make test-all   make test, and the slow tests (forge, fault sweeps)"
	@echo "make lint       ruff and mypy only        make format     rewrite with ruff"
	@echo "make bench      benchmarks/results.json and RESULTS.md"
	@echo "make proto      regenerate the gRPC stubs  make contracts  recompile the contracts"
	@echo "make clean      remove caches and builds (keeps .venv)"

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@tools/make-env.sh $(VENV) $(PYTHON)
	@touch $@

demo: $(STAMP)
	$(BIN)/gpumarket demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(BIN)/pytest -m "not slow" --durations=10

test-all: lint
	$(BIN)/pytest --durations=20

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py

proto: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iproto --python_out=proto --grpc_python_out=proto \
	  --mypy_out=quiet:proto --mypy_grpc_out=quiet:proto $(PROTOS)

contracts: $(STAMP)
	PATH="$$PATH:$(CURDIR)/$(BIN)" npm --prefix contracts install --no-save --ignore-scripts --no-audit --no-fund
	cd contracts && PATH="$$PATH:$(CURDIR)/$(BIN)" node compile.cjs

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build contracts/out contracts/cache
	find . -name __pycache__ -type d -not -path './.venv/*' -not -path './contracts/node_modules/*' -prune -exec rm -rf {} +
