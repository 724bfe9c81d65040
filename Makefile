# Two commands matter: `make demo` and `make test`. Each does all the set-up that it needs.

PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
# cpu, cuda or metal; where it is empty, install/accelerator.py looks at the machine.
ACCEL  ?=

# Without byte code of what is never imported: Python writes it at the first import.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	--constraint constraints.txt

TORCH_CPU_INDEX := --retries 0 --extra-index-url https://download.pytorch.org/whl/cpu

# Decides the accelerator once; then llama.cpp compiles while packages and vLLM are installed.
SET_UP = accel=$$($(PYTHON) install/accelerator.py $(ACCEL)) && \
	$(MAKE) --no-print-directory --jobs=2 ACCEL=$$accel

.PHONY: help demo test test-unit lint docs setup vllm clean

help:
	@echo "make demo        set up everything, run the quickstart, print where the report is"
	@echo "make test        set up everything, run the whole test suite"
	@echo "make test-unit   the unit tests alone, under two minutes"
	@echo "make setup       set up only; ACCEL=cpu, cuda or metal decides what is built"
	@echo "make vllm        set up, and install vLLM into an environment of its own"
	@echo "make docs        the pages of docs/ as a site, in build/docs"

demo: vllm
	$(BIN)/quantkit run quickstart

test: vllm
	@$(MAKE) --no-print-directory lint
	$(BIN)/python -m tests.fetch_llama_cpp
	$(BIN)/python -m tests.fetch_axe
	@command -v chromium >/dev/null || \
		echo "no chromium: the report's browser tests are skipped (Debian: apt-get install chromium)"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -n logical
	$(BIN)/python -m pytest tests/integration
	@$(MAKE) --no-print-directory docs

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

setup:
	@$(SET_UP) $(VENV)/.ready-$$accel

vllm:
	@$(SET_UP) $(VENV)/.ready-$$accel vllm-ready

# From here on ACCEL is decided. Each step leaves a file that says for which it was done.

.PHONY: vllm-ready
vllm-ready: $(VENV)/.packages-$(ACCEL)
ifeq ($(ACCEL),metal)
	@echo "vllm: left out; there is no build of it for macOS"
else
	@$(BIN)/quantkit engines install vllm --device $(ACCEL)
endif

$(VENV)/.ready-$(ACCEL): $(VENV)/.packages-$(ACCEL) $(VENV)/.llama-cpp-$(ACCEL)
	@rm -f $(VENV)/.ready-*
	@$(INSTALL) --force-reinstall --no-deps "$$(cat $(VENV)/.llama-cpp-$(ACCEL))"
	@$(INSTALL) --editable '.[llamacpp,demo]'
	@touch $@

$(VENV)/.llama-cpp-$(ACCEL): $(VENV)/.python constraints.txt $(wildcard install/llama_cpp.*)
	@rm -f $(VENV)/.llama-cpp-*
	@$(BIN)/python -m install.llama_cpp $(ACCEL) > $(VENV)/.building
	@mv $(VENV)/.building $@

# Without the demo's package, which demands llama-cpp-python.
$(VENV)/.packages-$(ACCEL): $(VENV)/.torch-$(ACCEL) pyproject.toml constraints.txt
	@rm -f $(VENV)/.packages-*
	@echo "packages: installing transformers, lm-eval, guidellm …"
	@$(INSTALL) --editable '.[eval,bench,serve,dev]'
	@echo "packages: installed"
	@touch $@

# First and alone, so that nothing pulls a CUDA build where a CPU build is meant.
$(VENV)/.torch-$(ACCEL): $(VENV)/.python constraints.txt
	@rm -f $(VENV)/.torch-*
	@echo "torch: installing"
	@$(INSTALL) --force-reinstall --no-deps $(if $(filter cpu,$(ACCEL)),$(TORCH_CPU_INDEX)) torch
	@touch $@

$(VENV)/.python:
	@echo "python: making an environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) --upgrade pip
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
