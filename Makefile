# `make quickstart` and `make test` need Python 3.11 or newer, make and a C++ compiler; they set up .venv themselves:
# the quickstart installs what running needs, and the targets for developers add what they need.
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
LOG := $(VENV)/setup.log
RUN := $(VENV)/ready
DEV := $(VENV)/ready-dev
EXTRAS := '.[dev,mpi]'
UNFINISHED := $(VENV)/unfinished
UNFINISHED_DEV := $(VENV)/unfinished-dev
MOVED := $(if $(wildcard $(RUN)),$(filter-out $(CURDIR),$(shell cat $(RUN))))
ANEW := $(if $(wildcard $(UNFINISHED))$(MOVED),anew)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_PROGRESS_BAR := off

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-slow test-all test-parallel test-faults lint docs bench clean anew

help:
	@echo 'make quickstart   from raw text to trained, evaluated and exported models, on this machine'
	@echo 'make test         the tests to run before a commit, in minutes (TEST_WORKERS=2)'
	@echo 'make test-all     those and the slow ones: every pair of layouts, real launchers, repeated kills'
	@echo 'make test-parallel  every layout of up to 8 ranks against one process; writes the table of docs/parallelism.md'
	@echo 'make test-faults  50 killed ranks and 10 stops of a small run, against one that is left alone'
	@echo 'make lint         ruff, mypy, import-linter'
	@echo 'make docs         write docs/configuration.md from the schema of the run configuration'
	@echo 'make bench        the benchmarks of tools/bench, at small sizes'
	@echo 'make setup        create or update .venv for all targets; each does it by itself (the quickstart: what running needs)'
	@echo 'make clean        remove .venv and caches; data, runs and results stay'

setup: $(DEV)

# What pip says goes to a log, which is shown if pip fails.
pip_install = $(BIN)/python -m pip install $(1) >>$(LOG) 2>&1 || { cat $(LOG) >&2; exit 1; }
constrained = export PIP_CONSTRAINT=$(PINS) PIP_BUILD_CONSTRAINT=$(PINS); $(call pip_install,$(1))

# While packages change, the file `unfinished` stands in .venv, and `ready` names the folder it was set up for: what
# was interrupted, or has been moved (its scripts hold paths), is made anew. Torch comes first and alone, so that no
# other package chooses its build. The constraints hold for the environments that packages are built in, too.
# What developers need adds packages and changes none, so that the quickstart still runs where adding them failed.
$(RUN): pyproject.toml setup.py constraints.txt $(ANEW)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed, and $(PYTHON) is not: make PYTHON=/path/to/newer/python3' >&2; exit 1; }
	@if [ -n '$(ANEW)' ]; then rm -rf $(VENV); fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV_OPTIONS) $(VENV)
	@touch $(UNFINISHED)
	@sed 's/^torch==.*/$(TORCH)/' constraints.txt > $(PINS)
	@: > $(LOG)
	@echo 'Setting up $(VENV), 1: $(TORCH) (0.8 GB as a CPU build, several GB as a CUDA build)'
	@$(call pip_install,$(TORCH_OPTIONS) -c $(PINS) setuptools wheel '$(TORCH)')
	@echo 'Setting up $(VENV), 2: the other packages that running needs (0.9 GB)'
	@$(call constrained,-e .)
	@echo '$(CURDIR)' > $(UNFINISHED)
	@mv $(UNFINISHED) $(RUN)

$(DEV): $(RUN)
	@if [ -e $(UNFINISHED_DEV) ]; then rm -rf $(VENV) && $(MAKE) --no-print-directory $(RUN); fi
	@touch $(UNFINISHED_DEV)
	@: > $(LOG)
	@echo 'Setting up $(VENV), 3: what tests, checks and benchmarks need besides (0.5 GB)'
	@$(call constrained,-e $(EXTRAS))
	@mv $(UNFINISHED_DEV) $(DEV)

quickstart: $(RUN)
	$(BIN)/python tools/quickstart.py

# A file stays on one worker, since its tests share launches; files that launch ranks come first, the short ones last.
pytest = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

test: $(DEV)
	$(pytest) -m 'not slow'

test-slow: $(DEV)
	$(pytest) -m slow

test-all: test test-slow

test-parallel: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.distributed.table

test-faults: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.kills --count 50
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.stops --count 10

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(DEV)
	$(BIN)/python tools/_docs.py

bench: $(DEV)
	@for script in tools/bench/[!_]*.py; do echo "== $$script"; $(BIN)/python $$script || exit; done

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
