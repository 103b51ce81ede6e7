# Each target sets itself up from a clean clone; what is up to date is left alone.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-full asan build lint bench native native-servers native-speculation wheel sdist docs clean models asan-run

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
PROMPT ?= The capital of France is
PYTEST_ARGS ?=
# What programs of the package run under; see asan.
UNDER ?=
SOURCES := $(shell find llama_crab build_tools setup.py pyproject.toml pytest_llama_crab.py third_party/fetch.py \
	third_party/llama_cpp.toml third_party/licenses -type f -not -name '*.py[co]' -not -name '*.so')

demo: build            ## complete a prompt on the small demo model, streaming, with timings
	$(BIN)/llama-crab run "$(PROMPT)"

test: build native models  ## what CI runs
	$(BIN)/pytest $(PYTEST_ARGS)

test-full: build native models asan  ## the long forms as well
	$(BIN)/pytest -m "" $(PYTEST_ARGS)

build: $(VENV)/installed  ## build and install the package into .venv

lint: $(VENV)/dev build
	export PATH="$(CURDIR)/$(BIN):$$PATH"; ruff check && ruff format --check && cython-lint llama_crab \
		&& mypy && stubtest llama_crab._core --mypy-config-file pyproject.toml --allowlist tests/typing/stubtest-allowlist.txt

bench: $(VENV)/dev build native native-servers native-speculation models  ## ratios to native llama-bench, in one run
	$(BIN)/pytest benchmarks $(PYTEST_ARGS)

native: $(VENV)/tools  ## what tests and benchmarks compare with: same tree, same flags
	$(BIN)/python build_tools/cmake_build.py llama-bench llama-completion llama-embedding

native-servers: $(VENV)/tools  ## what answers many requests at once; takes minutes the first time
	$(BIN)/python build_tools/cmake_build.py llama-server llama-batched-bench

native-speculation: $(VENV)/tools  ## llama.cpp's speculation without a draft model
	$(BIN)/python build_tools/cmake_build.py llama-lookup llama-speculative-simple llama-quantize

wheel: $(VENV)/tools
	$(BIN)/python setup.py -q bdist_wheel

sdist: $(VENV)/tools
	$(BIN)/python setup.py -q sdist

docs: $(VENV)/dev
	$(BIN)/mkdocs build --strict

models: $(VENV)/installed  ## and the tokenizer files of the full llama.cpp tree
	$(UNDER) $(BIN)/python third_party/fetch.py && $(UNDER) $(BIN)/python tests/fetch_models.py

asan:  ## the tests under AddressSanitizer, in a virtual environment of their own
	LLAMA_CRAB_SANITIZE=address $(MAKE) asan-run VENV=.venv-asan UNDER='env LD_PRELOAD="$(shell \
		c++ -print-file-name=libasan.so) $(shell c++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc'

# Not here: what limits the address space, of which the sanitizer takes terabytes, or watches memory
# that it keeps back on purpose.
asan-run: build models
	$(UNDER) $(BIN)/pytest --ignore tests/packaging --ignore tests/core/test_damaged_gguf.py \
		--ignore tests/lifetime/test_growth.py $(PYTEST_ARGS)

clean:
	rm -rf build dist site .venv .venv-asan *.egg-info

$(VENV)/tools: pyproject.toml build_tools/cmake_build.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q 'setuptools>=77' 'cython>=3.1' \
		$$($(BIN)/python build_tools/cmake_build.py --requirements)
	touch $@

$(VENV)/installed: $(VENV)/tools $(SOURCES)
	$(BIN)/python setup.py -q build_ext
	$(BIN)/python -m pip install -q --no-build-isolation '.[test]'
	touch $@

$(VENV)/dev: pyproject.toml | $(VENV)/installed
	$(BIN)/python -m pip install -q --no-build-isolation '.[dev]'
	touch $@
