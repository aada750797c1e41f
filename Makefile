# make demo: from nothing to served .vtk files.  make test: all tests.  make lint: format, style, types, imports.
# Needs Python 3.11, make and git. Set PYTHON where it has another name.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALL := PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --progress-bar off

.PHONY: demo test lint format clean

demo: .venv/.demo
	$(BIN)/python experiments/demo.py

test: .venv/.dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --cov --cov-report=term

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/isort --check-only .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/isort .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-bench demo

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "Expected Python 3.11, received $$($(PYTHON) --version 2>&1) as $(PYTHON); set PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/.demo: .venv/bin/python setup.cfg pyproject.toml constraints.txt
	@echo "installing lvseg with what it needs (once)"
	$(INSTALL) --editable '.[train,server]'
	@touch $@

.venv/.dev: .venv/.demo
	@echo "installing what the tests need (once)"
	$(INSTALL) --editable '.[train,server,cluster,dev]'
	@touch $@

# Benchmarks, in an environment of their own, since they need the libraries that are compared with. Prints the table;
# make bench BENCH=--update-readme also writes it into benchmarks/README.md.
.PHONY: bench
bench: .venv-bench/.done
	.venv-bench/bin/python benchmarks/run.py $(BENCH)

.venv-bench/.done: setup.cfg pyproject.toml constraints.txt constraints-bench.txt
	@echo "installing what the benchmarks need (once)"
	$(PYTHON) -m venv .venv-bench
	PIP_CONSTRAINT="$(CURDIR)/constraints.txt $(CURDIR)/constraints-bench.txt" PIP_DISABLE_PIP_VERSION_CHECK=1 \
		.venv-bench/bin/python -m pip install --quiet --progress-bar off --editable '.[train,bench]'
	@touch $@
