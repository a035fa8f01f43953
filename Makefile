# Two commands: `make train` trains and measures a GAN, `make test` runs every check.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUNS ?= runs
SCALE ?= small
CORES ?= $(shell nproc)
# A process for each core, each with one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

.DEFAULT_GOAL := help
.PHONY: help train test test-full paper mutants constraints tensorboard bench clean

help:
	@echo "make train        set up .venv when needed, train a GAN on real digits and measure its FID"
	@echo "make test         set up .venv when needed, run ruff, basedpyright and pytest"
	@echo "make test-full    run all of pytest: every shape and type of the kernels, every way to interrupt a run"
	@echo "make paper        run the paper's experiments, SCALE=smoke, small or full, and write a page of verdicts"
	@echo "make mutants      put 300 faults into a copy of the code and count those that the tests notice"
	@echo "make constraints  write down anew which versions train and test install"
	@echo "make tensorboard  show the runs on http://127.0.0.1:6006"
	@echo "make bench        time the normalization layers against BatchNorm"
	@echo "make clean        remove .venv and caches; runs are kept"

# The stamp is written last, so an interrupted installation is repeated. setuptools comes first and builds the project:
# an isolated build would take its newest release.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $(STAMP)

train: $(STAMP)
	$(BIN)/python -m cbgan.train $(ARGS)

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(PYTEST) --durations 10 $(ARGS)

test-full: $(STAMP)
	$(PYTEST) -m "" --durations 10 $(ARGS)

paper: $(STAMP)
	$(BIN)/snakemake -s workflow/Snakefile --cores $(CORES) --keep-going --rerun-incomplete --quiet rules \
		--config study=workflow/$(SCALE).yaml $(ARGS)

mutants: $(STAMP)
	$(BIN)/python tests/mutants $(ARGS)

constraints:
	@test -x build/uv/bin/uv || $(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install --quiet uv
	build/uv/bin/uv pip compile pyproject.toml --quiet --universal --all-extras --fork-strategy fewest --no-annotate \
		--custom-compile-command 'make constraints' --output-file constraints.txt $(ARGS)

tensorboard: $(STAMP)
	$(BIN)/tensorboard --logdir $(RUNS) --host 127.0.0.1

bench: $(STAMP)
	$(BIN)/python -m common.norms.bench $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
	rm -rf common/norms/build common/norms/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
