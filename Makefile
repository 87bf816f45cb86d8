# The interpreter.  python3 lives in .venv, any other in .venv-NAME, so that several can stand side by side.
PYTHON ?= python3
VENV := .venv$(if $(filter-out python3,$(notdir $(PYTHON))),-$(notdir $(PYTHON)))
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: help quickstart test test-clients lint
.DEFAULT_GOAL := help

help:
	@echo 'make quickstart   a million-parameter model: pretrained, quantized, fine-tuned, evaluated, exported'
	@echo 'make test         the tests, on CPU'
	@echo 'make test-clients  exports run by llama.cpp, mlx_lm and PEFT (builds llama.cpp: minutes)'
	@echo 'make lint         style and format'
	@echo 'Each makes its own environment first.  PYTHON=python3.12 chooses another interpreter.'

quickstart: $(VENV)/.installed
	$(VENV)/bin/python -m experiments.quickstart

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -q tests

test-clients: $(VENV)/.installed-clients
	$(VENV)/bin/python -m pytest -q -o addopts= -W default tests/clients

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

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
