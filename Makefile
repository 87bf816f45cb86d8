# The interpreter.  python3 lives in .venv, any other in .venv-NAME, so that several can stand side by side.
PYTHON ?= python3
VENV := .venv$(if $(filter-out python3,$(notdir $(PYTHON))),-$(notdir $(PYTHON)))
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
PIP := $(VENV)/bin/python $(PIP_INSTALL)
# jax that compiles for NVIDIA's chips wants a newer Python than the rest.
AOT_GPU_PYTHON ?= python3.12
AOT_GPU_VENV := .venv-aot-gpu

.PHONY: help quickstart test test-clients test-aot-gpu lint
.DEFAULT_GOAL := help

help:
	@echo 'make quickstart   a million-parameter model: pretrained, quantized, fine-tuned, evaluated, exported'
	@echo 'make test         the tests, on CPU'
	@echo 'make test-clients  exports run by llama.cpp, mlx_lm and PEFT (builds llama.cpp: minutes)'
	@echo 'make test-aot-gpu  kernels and memory, compiled for an H100 without one (AOT_GPU_PYTHON=python3.12)'
	@echo 'make lint         style and format'
	@echo 'Each makes its own environment first.  PYTHON=python3.12 chooses another interpreter.'

quickstart: $(VENV)/.installed
	$(VENV)/bin/python -m experiments.quickstart

# A process for every core, but four at most (each takes some GB), and a file's tests in one of them: they share what they
# compile and train.
test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -q --numprocesses=auto --maxprocesses=4 --dist=loadfile tests

test-clients: $(VENV)/.installed-clients
	$(VENV)/bin/python -m pytest -q -o addopts= -W default tests/clients

test-aot-gpu: $(AOT_GPU_VENV)/.installed-aot-gpu
	$(AOT_GPU_VENV)/bin/python -m pytest -q -o addopts= tests/aot_gpu
	$(AOT_GPU_VENV)/bin/python -m pytest -q -o addopts= tests/mosaic_gpu_test.py tests/fragments_test.py tests/triton_test.py

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(AOT_GPU_VENV)/bin/python:
	@$(AOT_GPU_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2> /dev/null || \
	  { echo 'set AOT_GPU_PYTHON to a Python >= 3.12' >&2; exit 1; }
	$(AOT_GPU_PYTHON) -m venv $(AOT_GPU_VENV)

# Stamps: pip runs again only when pyproject.toml has changed.
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-clients: pyproject.toml | $(VENV)/bin/python
	$(PIP) -e '.[clients]'
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(PIP) -e '.[test]'
	@touch $@ $(VENV)/.installed

$(AOT_GPU_VENV)/.installed-aot-gpu: pyproject.toml | $(AOT_GPU_VENV)/bin/python
	$(AOT_GPU_VENV)/bin/python $(PIP_INSTALL) -e '.[aot-gpu]'
	@touch $@
