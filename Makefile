# Each target first sets up .venv: Python 3.11 or newer, packages pinned by constraints.txt.
# `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
ARGS ?=

.PHONY: install help train test test-all faults bench gpu tutorials lint figure clean

install: $(VENV)/.installed ## set up .venv

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	"Python 3.11 or newer is needed, this is " + sys.version.split()[0] + \
	"; try: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt ".[dev]"
	@touch $@

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

# 700 steps, about five minutes on two cores; options in ARGS, as in
# make train ARGS="--model v1 --minutes 2"
train: install ## train a v3 on synthetic PET/CT; ARGS: options of train.py
	$(PY) train.py $(ARGS)

# A process per core, each with one thread: processes that compute with more wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 8 --dist worksteal

test: install ## run the tests; ARGS: options of pytest
	$(PYTEST) $(ARGS)

test-all: install ## run all tests, also those that train for minutes
	$(PYTEST) -m "slow or not slow" $(ARGS)

# Kills, faults and mutated inputs: 20 minutes on two cores; ARGS=--short: two; ARGS="--seed N"
faults: install ## try to lose a run or to get wrong data in; ARGS: options of tests/faults/run.py
	$(PY) tests/faults/run.py $(ARGS)

# Bytes and launches of the kernels, their registers on four GPUs, times of the kernels and of a
# prediction, sizes of the systems. MONAI and nnU-Net take part after `pip install ".[bench]"`.
bench: install ## run the benchmarks
	$(PY) benchmarks/traffic.py
	$(PY) benchmarks/budget.py
	$(PY) benchmarks/kernels.py
	$(PY) benchmarks/prediction.py
	$(PY) benchmarks/systems.py

# Needs a GPU, and torch, triton, numpy, scipy, matplotlib, tqdm, pytest and nibabel in the Python
# that runs it: .venv's if there is one, else PYTHON's. Repeats nothing that it has measured.
gpu: ## check and time everything on a GPU; ARGS: --dry (on a CPU), --parts step, --minutes 10
	@py=$(PY); [ -x $$py ] || py=$(PYTHON); $$py benchmarks/gpu.py $(ARGS)

tutorials: install ## run the notebooks from their sources; ARGS: 02 (one), --check (write nothing)
	$(PY) tutorials/run.py $(ARGS)

lint: install ## check the code with ruff, and the types of the core with pyright
	$(PY) -m ruff check .
	$(PY) -m pyright --pythonpath $(PY)

figure: install ## draw docs/architecture.png from the live model
	$(PY) -c "import figures, mirror_unet; \
	figures.architecture(mirror_unet.MirrorUNet('v3'), 'docs/architecture.png')"

clean: ## remove .venv and caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
