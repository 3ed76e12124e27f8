# Everything runs in .venv; the first run sets it up. PYTHON chooses the interpreter for it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# How many tests run at the same time.
JOBS ?= 2
# Versions for `make pythons`; all that are supported where this is empty.
PYTHONS ?=

SOURCES := lmcache_kit tools $(wildcard plugins/*/src)

.DEFAULT_GOAL := help
.PHONY: help setup model test test-random pythons lint format demo docs lmcache wheels clean distclean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Create .venv, or bring it up to date: vLLM for CPUs, the kit, what the tests need
	@$(PYTHON) -m tools.setup_env $(VENV)

model: setup ## Convert the small language model that tests and demo use, once
	@$(BIN)/python -m tools.make_model

test: setup model ## Run all tests; ARGS="-k name" for some, JOBS=4 for more at a time
	@# In the order of tests/conftest.py: the slow ones first.
	$(BIN)/python -m pytest -n $(JOBS) --no-loadscope-reorder --durations 30 $(ARGS)

test-random: setup model ## Run the tests that start no vLLM in random order; ARGS=--randomly-seed=N repeats one
	$(BIN)/python -m pytest -n $(JOBS) --no-loadscope-reorder -p randomly -m "not vllm" $(ARGS)

pythons: ## Run the tests that do without vLLM on each supported Python found here, in .venv-3.12 ...
	@$(PYTHON) -m tools.pythons $(PYTHONS) -- $(ARGS)

lint: setup ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(SOURCES)

format: setup ## Rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: setup model ## Real vLLM, a controller, a lookup, and the time that the cache saves
	@$(BIN)/python -m tools.demo $(ARGS)

docs: setup ## Build the documentation into site/; a link that leads nowhere is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "site/index.html"

lmcache: setup ## Create .venv-lmcache: LMCache on top of .venv, for the benchmarks
	@$(PYTHON) tools/setup_lmcache.py $(VENV) .venv-lmcache

wheels: setup ## Build wheels and sdists of core and plugins into dist/
	@for folder in . plugins/*/; do \
		(cd $$folder && $(abspath $(BIN))/python -m hatchling build -d $(CURDIR)/dist) || exit 1; \
	done

clean: ## Remove what builds and tests left behind
	rm -rf dist build site .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +

distclean: clean ## Remove all environments and the converted model too
	rm -rf .venv .venv-* $(VENV) .cache
