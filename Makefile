# make demo: set everything up and run the main job on the model that ships with the package.
# make test: set everything up and pass the tests. Both need only Python 3.10+ and a package index.

PYTHON ?= python3
# A pinned torch: an open range can pull several gigabytes of CUDA libraries onto a machine without a GPU.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow lint setup clean

demo: $(VENV)/runtime
	$(BIN)/whit demo

test: $(VENV)/dev
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/dev

$(VENV)/runtime: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/dev: $(VENV)/runtime
	$(BIN)/python -m pip install -q -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
