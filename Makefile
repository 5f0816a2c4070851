# `make quickstart` and `make test` need Python 3.11 or newer, make and a C++ compiler; they set up .venv themselves.
#
#   PYTHON=python3.12                    the Python to make .venv with
#   TORCH=torch==2.11.0                  another torch than constraints.txt names
#   TORCH_OPTIONS='--extra-index-url U'  for the pip call that installs torch: U has its CPU builds, or those of a CUDA
#   VENV_OPTIONS=--system-site-packages  let .venv see the packages of PYTHON
#
# By default torch is the build that pip prefers where it looks: a local CPU build goes before the package index's,
# which is a CUDA build on Linux, several GB large, and works without a GPU too. A GPU machine keeps the torch it
# has with `make setup TORCH=torch==2.11.0 VENV_OPTIONS=--system-site-packages` (its own version for 2.11.0); export
# both variables where later set-ups are to know of them too.

PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' constraints.txt)
TORCH_OPTIONS ?=
VENV_OPTIONS ?=
TEST_WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PINS := $(VENV)/constraints.txt
READY := $(VENV)/ready
UNFINISHED := $(VENV)/unfinished
RELOCATED := $(if $(wildcard $(READY)),$(if $(filter $(CURDIR),$(shell cat $(READY))),,relocated))

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-parallel test-faults lint bench clean relocated

help:
	@echo 'make quickstart   from raw text to trained, evaluated and exported models, on this machine'
	@echo 'make test         all tests (TEST_WORKERS=2)'
	@echo 'make test-parallel  every layout of up to 8 ranks against one process; writes the table of docs/parallelism.md'
	@echo 'make test-faults  50 killed ranks and 10 stops of a small run, against one that is left alone'
	@echo 'make lint         ruff, mypy, import-linter'
	@echo 'make bench        the benchmarks of tools/bench, at small sizes'
	@echo 'make setup        create or update .venv; the targets above do it when needed'
	@echo 'make clean        remove .venv and caches; data, runs and results stay'

setup: $(READY)

# While packages change, the file `unfinished` stands in .venv, and `ready` names the folder it was set up for: what
# was interrupted, or has been moved (its scripts hold paths), is made anew. Torch comes first and alone, so that no
# other package chooses its build. The constraints hold for the environments that packages are built in, too.
$(READY): pyproject.toml setup.py constraints.txt $(RELOCATED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed, and $(PYTHON) is not: make PYTHON=/path/to/newer/python3' >&2; exit 1; }
	if [ -e $(UNFINISHED) ] || [ -n '$(RELOCATED)' ]; then rm -rf $(VENV); fi
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV_OPTIONS) $(VENV)
	touch $(UNFINISHED)
	@echo 'Setting up $(VENV): torch, then the other packages (2.2 GB in all; a few minutes on a slow network)'
	sed 's/^torch==.*/$(TORCH)/' constraints.txt > $(PINS)
	$(BIN)/python -m pip install --quiet $(TORCH_OPTIONS) -c $(PINS) setuptools wheel '$(TORCH)'
	PIP_CONSTRAINT=$(PINS) PIP_BUILD_CONSTRAINT=$(PINS) $(BIN)/python -m pip install --quiet -e '.[dev,mpi]'
	echo '$(CURDIR)' > $(UNFINISHED)
	mv $(UNFINISHED) $(READY)

quickstart: $(READY)
	$(BIN)/python tools/quickstart.py

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

test-parallel: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.dist.table

test-faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.kills --count 50
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.stops --count 10

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	@for script in tools/bench/[!_]*.py; do echo "== $$script"; $(BIN)/python $$script || exit; done

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
