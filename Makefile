# Everything runs from the environment in .venv, made on first use and renewed when pyproject.toml or constraints.txt change.
# `make PYTHON=python3.12` chooses the interpreter. pip's own settings apply (PIP_EXTRA_INDEX_URL and the like): where CPU builds of torch
# live in an index of their own, name it there, and no CUDA build is downloaded.

PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROOFS := contracts/.cache/proofs
# Most tests wait for processes and blocks: two files at a time take little more than half as long.
SIDE_BY_SIDE ?= -n 2 --dist loadfile
PROTOS := $(wildcard proto/gpumarket/v1/*.proto)

.PHONY: help env demo test test-all compose-test reliability lint format bench bench-gas proto contracts prove slither clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       the whole market on this machine: advertise, match, execute, verify, settle"
	@echo "make test       ruff, mypy and every test that takes less than a minute"
	@echo "make test-all   make test, and the slow tests (forge, proofs, fault sweeps)"
	@echo "make compose-test  the network in containers, broken in every way (needs a container engine)"
	@echo "make reliability  make test-all, and write its figures to docs/reliability.md"
	@echo "make lint       ruff and mypy only        make format     rewrite with ruff"
	@echo "make bench      benchmarks/results.json and RESULTS.md"
	@echo "make bench-gas  what the contracts cost, beside their peers"
	@echo "make prove      prove the contracts with halmos     make slither    analyse them with slither"
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
	$(BIN)/pytest -m "not slow and not compose" $(SIDE_BY_SIDE) --durations=10

test-all: lint $(PROOFS)/.installed
	$(BIN)/pytest -m "not compose" $(SIDE_BY_SIDE) --durations=20

# On a container engine; skipped, and said so, where none answers. GPUMARKET_WHEELS names a folder of wheels where no index has a CPU torch.
compose-test: $(STAMP)
	$(BIN)/pytest -m compose -s tests/compose

# Long: every fault is injected as often as docs/reliability.md says. `make reliability FAST=1` injects less, and fails at the end where a
# row has a figure from slow tests only, naming them.
reliability: lint $(PROOFS)/.installed
	@mkdir -p build && rm -f build/reliability.jsonl
	GPUMARKET_RELIABILITY=$(CURDIR)/build/reliability.jsonl $(BIN)/pytest $(if $(FAST),-m "not slow and not compose") --durations=20
	$(BIN)/python tools/reliability.py build/reliability.jsonl

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py

bench-gas: $(STAMP)
	$(BIN)/python benchmarks/run.py gas

prove: $(STAMP) $(PROOFS)/.installed
	$(BIN)/pytest -k "not slither" tests/unit/test_contracts_proofs.py

slither: $(STAMP) $(PROOFS)/.installed
	$(BIN)/pytest -k slither tests/unit/test_contracts_proofs.py

# halmos and slither want another web3 than the market: an environment of their own. Offline once installed.
$(PROOFS)/.installed: contracts/proofs/requirements.txt | $(STAMP)
	$(BIN)/python -m venv $(PROOFS)
	$(PROOFS)/bin/pip install --quiet --disable-pip-version-check -r contracts/proofs/requirements.txt
	@touch $@

proto: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iproto --python_out=proto --grpc_python_out=proto \
	  --mypy_out=quiet:proto --mypy_grpc_out=quiet:proto $(PROTOS)
	@for proto in $$(grep -L '^service ' $(PROTOS)); do rm -f $${proto%.proto}_pb2_grpc.py $${proto%.proto}_pb2_grpc.pyi; done

contracts: $(STAMP)
	PATH="$$PATH:$(CURDIR)/$(BIN)" npm --prefix contracts install --no-save --ignore-scripts --no-audit --no-fund
	cd contracts && PATH="$$PATH:$(CURDIR)/$(BIN)" node compile.cjs
	$(BIN)/python tools/publish_contracts.py

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build contracts/out contracts/cache
	find . -name __pycache__ -type d -not -path './.venv/*' -not -path './contracts/node_modules/*' -prune -exec rm -rf {} +
