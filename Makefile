# `make demo` and `make test` do all set-up; both are quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test lint types bench bars results gpu roofline clean
.DELETE_ON_ERROR:

# torch first: a range asked for by another package would fetch a build of its own choice
$(VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools pybind11
	$(PIP) --no-build-isolation --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/fastvae demo --output runs/demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# the package as it is installed, kernels/ and all, is what is checked
types: $(VENV)/installed
	rm -rf build/types
	$(BIN)/python setup.py --quiet build_py --build-lib build/types
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python -m pytest --benchmark-only

bars: $(VENV)/installed
	$(BIN)/python -m fastvae.benchmarks.bars

# On an idle machine: a new file in benchmarks/results, the table of the README and the picture made from it.
results: $(VENV)/installed
	$(BIN)/python -m fastvae.benchmarks.run --publish

roofline: $(VENV)/installed
	$(BIN)/python -m fastvae.benchmarks.static_roofline

# On a machine with a GPU, in the environment that is active: checks every op on the device, then times it.
gpu:
	$(PYTHON) benchmarks/gpu.py

clean:
	rm -rf $(VENV) build runs *.egg-info
