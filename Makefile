# Two commands matter: `make demo` and `make test`. Each does all the set-up that it needs.

PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin

# llama.cpp's own tools and server, of the same commit as the library, come with its wheel.
# $$ORIGIN: they find their libraries next to them, wherever the environment lies.
LLAMA_CMAKE_ARGS := -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_SERVER=ON \
	-DLLAMA_TOOLS_INSTALL=ON -DLLAMA_BUILD_UI=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF \
	-DLLAMA_BUILD_EXAMPLES=OFF

.PHONY: help demo test test-unit lint docs setup vllm clean

help:
	@echo "make demo        set up everything, run the quickstart, print where the report is"
	@echo "make test        set up everything, run the whole test suite"
	@echo "make test-unit   the unit tests alone, under two minutes"
	@echo "make docs        the pages of docs/ as a site, in build/docs"

demo: setup vllm
	$(BIN)/quantkit run quickstart

test: setup vllm lint
	$(BIN)/python -m tests.fetch_llama_cpp
	@command -v chromium >/dev/null || \
		echo "no chromium: the report's browser tests are skipped (Debian: apt-get install chromium)"
	$(BIN)/python -m pytest tests

test-unit: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -n logical

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m docs.reference
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs build/docs
	@echo "build/docs/index.html"

setup: $(VENV)/.ready

vllm: setup
	$(BIN)/quantkit engines install vllm

$(VENV)/.ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# torch first and alone, so that nothing pulls a CUDA build where a CPU build is meant.
	$(BIN)/python -m pip install --quiet --retries 0 --constraint constraints.txt \
		--extra-index-url https://download.pytorch.org/whl/cpu torch
	@echo "building llama.cpp (once; 8 to 15 minutes on two cores)"
	CMAKE_ARGS="$(LLAMA_CMAKE_ARGS)" $(BIN)/python -m pip install --quiet \
		--constraint constraints.txt llama-cpp-python
	@# A wheel that pip had kept from elsewhere may lack the tools: then build it after all.
	test -x $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/bin/llama-server || \
		CMAKE_ARGS="$(LLAMA_CMAKE_ARGS)" $(BIN)/python -m pip install --quiet --no-cache-dir \
		--force-reinstall --no-deps --constraint constraints.txt llama-cpp-python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
