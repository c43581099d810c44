# specmoe from a fresh clone: `make demo`, `make test`. Everything installs into .venv.

# The first Python of at least 3.11 on the path; override with `make PYTHON=/path/to/python3 ...`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The ends of what pyproject.toml allows, for `make compat`.
# Triton 3.6, which torch 2.11 asks for, cannot index in its interpreter with numpy 2.4.
OLDEST := torch==2.11.0 transformers==5.17.0 'numpy<2.4'
NEWEST := torch==2.15.0 transformers==5.24.0
# Tests run in so many processes; each takes about 1.2 GB.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test check lint format compat compat-oldest compat-newest bench peers publish clean

help:  ## Show this list.
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */  make \1\t/' | expand -t 18

setup: $(STAMP)  ## Create .venv and install the package with everything that tests need.

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "specmoe needs Python 3.11 or newer; none is on the path. Name one: make PYTHON=/path/to/python3" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# Without a GPU a PyTorch that lies in a folder of wheels (PIP_FIND_LINKS) will do: the index's needs gigabytes of CUDA.
	@command -v nvidia-smi >/dev/null || $(BIN)/python -m pip install --quiet --no-index --no-deps torch 2>/dev/null || true
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@# A wheel carries the C++ engine; an editable install has it compiled here, and not in front of the first token.
	$(BIN)/python -m specmoe_compile.runtime.cpu.native
	@touch $@

demo: $(STAMP)  ## Watch a real MoE generate with its experts on disk (a few minutes on 2 cores).
	$(BIN)/specmoe demo

test: $(STAMP)  ## The fast tests, without a GPU.
	$(BIN)/python -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist loadscope --durations=20

lint: $(STAMP)  ## Lint, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test  ## What continuous integration runs: lint, types and tests.

compat: compat-oldest compat-newest  ## The fast tests with the oldest and the newest PyTorch and transformers, each in an environment of its own.

.venv-oldest/.installed: PINS := $(OLDEST)
.venv-newest/.installed: PINS := $(NEWEST)
.venv-%/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "specmoe needs Python 3.11 or newer; none is on the path. Name one: make PYTHON=/path/to/python3" >&2; exit 2; }
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --editable '.[dev]' $(PINS)
	@touch $@

compat-oldest compat-newest: compat-%: .venv-%/.installed
	.venv-$*/bin/python -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist loadscope

format: $(STAMP)  ## Apply the formatter and the fixes that ruff is sure of.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## The published comparison with the peers: docs/results/log/cpu-disk.md (under 20 minutes on two cores, quiet machine).
	$(BIN)/python -m benchmarks cpu_disk

peers: $(STAMP)  ## llama.cpp for the arm llama_cpp of make bench; compiles it from source, which takes long.
	$(BIN)/python -m pip install --quiet 'specmoe-compile[peers] @ file://$(CURDIR)'

publish: $(STAMP)  ## The published end-to-end benchmark: docs/results/log/end_to_end.md (an hour, quiet machine).
	$(BIN)/python -m benchmarks end_to_end

clean:  ## Remove what tools left behind; not .venv, not the expert stores.
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
