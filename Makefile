# make demo: set everything up and run the main job on the model that ships with the package.
# make test: set everything up and pass the tests. Both need only Python 3.10+ and a package index.

PYTHON ?= python3
# A pinned torch: an open range can pull several gigabytes of CUDA libraries onto a machine without a GPU.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
# Threads that wait sleep instead of spinning: beside other work on the same cores that is several times as fast.
export OMP_WAIT_POLICY := passive

# Tests that touch transformers, for another release of it.
LOADING_TESTS := tests/integrations tests/modules tests/compiled tests/evaluation/test_loading.py tests/cli/test_generate.py tests/pipeline/test_account.py tests/pipeline/test_folders.py tests/pipeline/test_refused.py

# One process per core, and a core per process.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal
test test-transformers: export OMP_NUM_THREADS := 1

.PHONY: demo test test-slow test-transformers test-wheel lint docs report report-shipped setup clean

demo: $(VENV)/runtime
	$(BIN)/whit demo

test: $(VENV)/dev
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -m slow

test-transformers: $(VENV)/dev
	$(BIN)/python -m pip install -q --no-deps --upgrade --target $(VENV)/transformers-$(VERSION) \
		"transformers==$(VERSION)" "huggingface_hub>=1.5,<2"
	$(BIN)/python -m pip install -q --upgrade --target $(VENV)/transformers-$(VERSION) "httpx>=0.23,<1"
	PYTHONPATH=$(VENV)/transformers-$(VERSION) $(BIN)/python -c \
		"import transformers; assert transformers.__version__ == '$(VERSION)', transformers.__version__"
	PYTHONPATH=$(VENV)/transformers-$(VERSION) $(BIN)/python -m pytest -m "not slow" $(PARALLEL) $(LOADING_TESTS)

test-wheel: $(VENV)/dev
	rm -rf $(VENV)/wheel && $(BIN)/python -m pip wheel -q --no-deps -w $(VENV)/wheel .
	$(BIN)/python -m pip install -q --no-deps --upgrade --target $(VENV)/wheel/site $(VENV)/wheel/*.whl
	cd $(VENV)/wheel && PYTHONPATH=site ../bin/python -m whit evaluate whit:model --max-tokens 512
	cd $(VENV)/wheel && PYTHONPATH=site ../bin/python -c "import whit; assert 'site' in whit.__file__, whit.__file__"

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/runtime
	test -x $(VENV)/docs/bin/mkdocs || $(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/python -m pip install -q "mkdocs-material>=9.5"
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --strict --quiet

# The measured comparisons under docs/: on the shared real model, beside bitsandbytes, and on the model that ships.
# What is measured once is kept in WORK; `make report OPTIONS="--threads 2 --speed-again"` measures speeds alone again.
SHARED ?= $(HOME)/.cache/whit-shared
WORK ?= $(HOME)/.cache
OPTIONS ?= --threads 2
CANDIDATES := int8,nf4-dq,int4-g64,gptq:int4-g64,awq:int4-g64,gptq:int3-g64,awq:int3-g64,int2-g32,ternary
SHIPPED := int8,nf4-dq,int4-g64,gptq:int4-g64,gptq:int3-g64-asym,bitsandbytes:nf4
FILES := report.html report.md results.json *.png
report: $(VENV)/dev
	$(BIN)/whit compare $(SHARED)/models/smollm2-135m-fp $(WORK)/report-smollm2 \
		--candidates '$(CANDIDATES),bitsandbytes:nf4,bitsandbytes:int8' \
		--text $(SHARED)/data/wikitext2/wiki.test.raw --max-tokens 8192 \
		--calibration $(SHARED)/data/text/wiki_train.txt --samples 32 --calibration-context 512 \
		--tasks piqa,arc_easy --limit 50 --task-data $(SHARED)/data $(OPTIONS)
	mkdir -p docs/report-smollm2
	cd $(WORK)/report-smollm2 && cp $(FILES) $(CURDIR)/docs/report-smollm2
	$(BIN)/python docs/screenshots.py docs/report-smollm2

report-shipped: $(VENV)/dev
	$(BIN)/whit compare whit:model $(WORK)/report-shipped --candidates '$(SHIPPED)' --max-tokens 16384 \
		--samples 32 --calibration-context 512 $(OPTIONS)
	cd $(WORK)/report-shipped && cp $(FILES) $(CURDIR)/docs/report
	$(BIN)/python docs/screenshots.py docs/report

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
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .site
