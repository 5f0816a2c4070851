# `make quickstart` and `make test` need Python 3.11 or newer, make and a C++ compiler. They set up .venv themselves:
# the quickstart installs the packages for running, and the targets for developers add theirs.
#
#   PYTHON=python3.11                    the Python with which .venv is made
#   TORCH=torch==2.11.0                  another version of torch than that of constraints.txt
#   TORCH_OPTIONS='--extra-index-url U'  options of the pip call that installs torch: U has CPU builds, or CUDA builds
#   VENV_OPTIONS=--system-site-packages  makes the packages of PYTHON visible in .venv
#
# By default pip chooses the build of torch: a local CPU build if there is one, else that of the package index, which
# on Linux is a CUDA build of several GB that also works without a GPU. To keep the torch of a GPU machine, run
# `make setup TORCH=torch==2.11.0 VENV_OPTIONS=--system-site-packages` with its own version, and export
# both variables for later set-ups.

PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' constraints.txt)
TORCH_OPTIONS ?=
VENV_OPTIONS ?=
TEST_WORKERS ?= 2
GPU_CHECK ?=

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
REMAKE := $(if $(wildcard $(UNFINISHED))$(MOVED),remake)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_PROGRESS_BAR := off

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-slow test-all test-parallel test-faults lint docs bench gpu-check clean remake

help:
	@echo 'make quickstart   from raw text to trained, evaluated and exported models, on this machine'
	@echo 'make test         the tests to run before a commit, in minutes (TEST_WORKERS=2)'
	@echo 'make test-all     also the slow tests: every pair of layouts, real launchers, repeated kills'
	@echo 'make test-parallel  compare every layout of up to 8 ranks with one process; writes a table of docs/parallelism.md'
	@echo 'make test-faults  50 killed ranks and 10 stops of a small run, compared with an undisturbed run'
	@echo 'make lint         ruff, mypy, import-linter, the glossary'
	@echo 'make docs         write docs/configuration.md from the schema of the run configuration'
	@echo 'make bench        the benchmarks of tools/bench, at small sizes'
	@echo 'make gpu-check    check a GPU in at most 12 minutes: kernels, losses, speed, checkpoints (GPU_CHECK="--only attention")'
	@echo 'make setup        create or update .venv for all targets; every target does this itself'
	@echo 'make clean        remove .venv and caches; data, runs and results stay'

setup: $(DEV)

# pip's output goes to a log, which is shown if pip fails.
pip_install = $(BIN)/python -m pip install $(1) >>$(LOG) 2>&1 || { cat $(LOG) >&2; exit 1; }
constrained = export PIP_CONSTRAINT=$(PINS) PIP_BUILD_CONSTRAINT=$(PINS); $(call pip_install,$(1))

# While packages change, .venv has the file `unfinished`; `ready` contains the folder it was set up for. A .venv that was
# interrupted or moved (its scripts contain paths) is made again. Torch is installed first and alone, so that no other
# package chooses its build. The constraints also apply to the environments in which packages are built.
# The packages for developers are additional and change none, so that the quickstart runs even if adding them failed.
$(RUN): pyproject.toml setup.py constraints.txt $(REMAKE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed, and $(PYTHON) is not: make PYTHON=/path/to/newer/python3' >&2; exit 1; }
	@if [ -n '$(REMAKE)' ]; then rm -rf $(VENV); fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV_OPTIONS) $(VENV)
	@touch $(UNFINISHED)
	@sed 's/^torch==.*/$(TORCH)/' constraints.txt > $(PINS)
	@: > $(LOG)
	@echo 'Setting up $(VENV), 1: $(TORCH) (0.8 GB as a CPU build, several GB as a CUDA build)'
	@$(call pip_install,$(TORCH_OPTIONS) -c $(PINS) setuptools wheel '$(TORCH)')
	@echo 'Setting up $(VENV), 2: the other packages for running (0.9 GB)'
	@$(call constrained,-e .)
	@echo '$(CURDIR)' > $(UNFINISHED)
	@mv $(UNFINISHED) $(RUN)

$(DEV): $(RUN)
	@if [ -e $(UNFINISHED_DEV) ]; then rm -rf $(VENV) && $(MAKE) --no-print-directory $(RUN); fi
	@touch $(UNFINISHED_DEV)
	@: > $(LOG)
	@echo 'Setting up $(VENV), 3: packages for tests, checks and benchmarks (0.5 GB)'
	@$(call constrained,-e $(EXTRAS))
	@mv $(UNFINISHED_DEV) $(DEV)

quickstart: $(RUN)
	$(BIN)/python tools/quickstart.py

# All tests of a file run on one worker, since they share launches; files that launch ranks run first, short ones last.
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
	$(BIN)/python tools/_glossary.py

docs: $(DEV)
	$(BIN)/python tools/_docs.py

bench: $(DEV)
	@for script in tools/bench/[!_]*.py; do echo "== $$script"; $(BIN)/python $$script || exit; done

# The results are in gpu-check/. GPU_CHECK has further options, such as --write-docs.
gpu-check: $(DEV)
	$(BIN)/python tools/gpu_check.py $(GPU_CHECK)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
