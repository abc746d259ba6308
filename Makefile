# Every target does the set-up it needs; `scripts/setup` says what that is. A second call finds it done.

BIN := .venv/bin
LINTED := . scripts/run-tests

.PHONY: help setup venv demo test unit acceptance lint format bench clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: setup ## protect a Linux guest, kill its host, watch it go on (ARGS="--rounds 5 ...")
	$(BIN)/colo demo $(ARGS)

test: setup ## all tests: unit, then acceptance with real QEMU (COLOTX_QEMU=/path for another one)
	@$(BIN)/python scripts/run-tests colotx tests

unit: venv ## the tests that need no QEMU
	@$(BIN)/python scripts/run-tests colotx

acceptance: setup ## the tests with real QEMU
	@$(BIN)/python scripts/run-tests tests

lint: venv ## ruff and mypy
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/mypy

format: venv ## let ruff rewrite the code
	$(BIN)/ruff check --fix $(LINTED)
	$(BIN)/ruff format $(LINTED)

bench: setup ## measure, JSON out (ARGS=...)
	$(BIN)/python -m benchmarks $(ARGS)

setup: ## the set-up alone
	@scripts/setup

venv:
	@scripts/setup python

clean: ## remove what was built, keep what was downloaded
	rm -rf build dist _trial_temp* .hypothesis .mypy_cache .ruff_cache twisted/plugins/dropin.cache
	find . -name __pycache__ -not -path './.venv/*' -not -path './.cache/*' -prune -exec rm -rf {} +
