# `make demo` and `make test` need Python 3.11 or newer and make; each installs what it needs, once.
PYTHON ?= python3
VENV ?= .venv
DATA ?= ../shared/data
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test unit federation chaos loopback lint experiments bench
.DELETE_ON_ERROR:

setup: $(READY)

# exact versions only: a free choice of torch would bring gigabytes of CUDA
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Python %d.%d is too old; need 3.11 or newer: make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/wardround demo

# real processes beside the rest: each is one after the other, and both are needed
test: $(READY)
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target federation unit

unit: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not federation"

federation: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m federation

# every kill point and length, before a release
chaos: $(READY)
	WARDROUND_CHAOS=1 $(BIN)/python -m pytest -m federation

loopback: $(READY)
	$(BIN)/python -m deploy.loopback

lint: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

experiments: $(READY)
	$(BIN)/python bench/experiments.py $(DATA)

# PARTS='fold commands' measures only those
bench: $(READY)
	$(BIN)/python -m bench $(PARTS)
