# make train | test | test-all | bench | tutorials | lint: each sets up .venv first (Python 3.11 or newer, packages pinned by constraints.txt).
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
ARGS ?=

.PHONY: install train test test-all bench tutorials lint figure clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt ".[dev]"
	@touch $@

# A v3 on synthetic PET/CT: 700 steps, about five minutes on two cores. Options go in ARGS, e.g. make train ARGS="--model v1 --minutes 2"
train: install
	$(PY) train.py $(ARGS)

test: install
	$(PY) -m pytest -q $(ARGS)

# Everything, also the tests that train for minutes
test-all: install
	$(PY) -m pytest -q -m "slow or not slow" $(ARGS)

# Bytes and launches of the kernels, their registers on four GPUs, times; the peers too where `pip install ".[bench]"` was done
bench: install
	$(PY) benchmarks/traffic.py
	$(PY) benchmarks/budget.py
	$(PY) benchmarks/kernels.py
	$(PY) benchmarks/prediction.py
	$(PY) benchmarks/systems.py

# Runs every notebook of tutorials/ from its source and keeps the outputs; ARGS="--check" only checks, ARGS="02" runs one
tutorials: install
	$(PY) tutorials/run.py $(ARGS)

lint: install
	$(PY) -m ruff check .

figure: install
	$(PY) -c "import figures, mirror_unet; figures.architecture(mirror_unet.MirrorUNet('v3'), 'docs/architecture.png')"

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
