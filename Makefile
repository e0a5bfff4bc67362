.DEFAULT_GOAL := help
.PHONY: help setup demo test soak lab lint bench clean

SHELL := /bin/bash
BIN := .venv/bin
SOAK := $(BIN)/pytest -v -rP -p no:logging --no-header --durations 0 --durations-min 1 -m soak --timeout 0

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv and install everything into it; at once when nothing changed
	@./setup.sh

demo: setup ## a whole run on this machine: volunteers come, go and are killed, and the model learns
	$(BIN)/dugnad demo tiny-books

test: setup ## units and simulations on two cores, then sockets and processes one at a time
	$(BIN)/pytest -q -n 2 -m "not (net or e2e or soak)"
	$(BIN)/pytest -q -m "(net or e2e) and not soak"

soak: setup ## what takes an hour: 900 seeds of chaos, large swarms, 200 kills of real processes; keeps its output
	set -o pipefail; ($(SOAK) -n 2 tests/sim && $(SOAK) tests/e2e tests/net) | tee docs/soak.txt

lab: setup ## who reaches whom through which routers, in namespaces: make lab OUT=lab.json, as root
	$(BIN)/python -m tests.net.lab_report $(or $(OUT),$(error name a file: make lab OUT=lab.json))

lint: setup ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: setup ## ratios against other systems, measured side by side
	@set -e; for bench in tests/bench/bench_*.py; do echo "== $$bench"; $(BIN)/python -m tests.bench.$$(basename $$bench .py); done

clean: ## remove caches and build leftovers; .venv stays
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +
