# make demo · make test · make check · make bench · make fuzz · make chaos · make serve   (each makes .venv first if missing)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help .venv demo test check bench fuzz chaos format serve clean

help:  ## this list
	@grep -E '^[a-z.]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv: .venv/installed  ## the virtual environment alone

.venv/installed: pyproject.toml constraints.txt
	@echo "Installing into .venv (one to five minutes, depending on the network) ..."
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	  { echo "Graft needs Python 3.11 to 3.13; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[worker,dev]'
	@touch $@

demo: .venv/installed  ## fine-tune graft-tiny through the openai SDK, from upload to an adapter that PEFT loads
	@$(BIN)/python examples/demo.py

test: .venv/installed  ## all tests, against a real PostgreSQL and a real Redis; the kernels through the interpreter
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels

check: .venv/installed  ## format, lint, types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/installed  ## reader, tokeniser and service; on a GPU also every kernel, then training beside installed peers
	$(BIN)/python benchmarks/reader.py
	$(BIN)/python benchmarks/tokenizing.py
	$(BIN)/python benchmarks/service.py
	$(BIN)/python benchmarks/overhead.py
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(BIN)/python -m graft_kernels.bench && $(BIN)/python benchmarks/train.py; \
	else echo "Skipped, for they need a GPU and torch finds none: graft_kernels.bench, benchmarks/train.py"; fi

fuzz: .venv/installed  ## for 600 seconds or SECONDS=n: random files against the reader's promises
	@$(BIN)/python -c 'import atheris' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python tests/fuzz/reader.py -max_total_time=$(or $(SECONDS),600)

chaos: .venv/installed  ## faults against real processes, 5 minutes or KILLS=n kills or SECONDS=n; SEED=n repeats one
	$(BIN)/python -m tests.chaos $(if $(KILLS),--kills $(KILLS)) $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED))

format: .venv/installed  ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

serve: .venv/installed  ## the service with its defaults: http://127.0.0.1:8000/v1, data in ~/.graft
	@$(BIN)/graft serve

clean:  ## remove what make and the tools have made
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis demo-output chaos-output
