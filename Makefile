# make demo: from nothing to served .vtk files.  make test: all tests.  make lint: format, style, types, imports.
# make test-current: all tests with current TensorFlow and Keras 3, whatever the Python.  make bench: benchmarks.
# Needs Python 3.11 (or 3.12, where all of it uses current TensorFlow), make and git. Set PYTHON where it has another name.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
PIP_INSTALL := -m pip --disable-pip-version-check install --quiet --progress-bar off
# The exact versions for a Python, as setup.cfg chooses by its version too.
constraints = $(CURDIR)/$(shell $(1) -c 'import sys; print("constraints.txt" if sys.version_info < (3, 12) else "constraints-current.txt")')
INSTALL = PIP_CONSTRAINT=$(call constraints,$(BIN)/python) $(BIN)/python $(PIP_INSTALL)
CHECK_PYTHON = @$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
	{ echo "Expected Python 3.11 or 3.12, received $$($(PYTHON) --version 2>&1) as $(PYTHON); set PYTHON=..." >&2; exit 2; }

.PHONY: demo test coverage test-current lint format clean

demo: .venv/.demo
	$(BIN)/python experiments/demo.py

test: .venv/.dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Counting lines makes TensorFlow's tracing of graphs half as slow again.
coverage: .venv/.dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term

# Where the stack of make test is at hand too, each must serve what the other exported. TESTS=... for some files alone.
test-current: .venv-current/.done
	LVSEG_OTHER_PYTHON="$(if $(wildcard .venv/.demo),$(CURDIR)/$(BIN)/python)" \
		.venv-current/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(TESTS)

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
	rm -rf .venv .venv-current .venv-bench demo

.venv/bin/python:
	$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/.demo: .venv/bin/python setup.cfg pyproject.toml constraints.txt constraints-current.txt
	@echo "installing lvseg with what it needs (once)"
	$(INSTALL) --editable '.[train,server]'
	@touch $@

.venv/.dev: .venv/.demo
	@echo "installing what the tests need (once)"
	$(INSTALL) --editable '.[train,server,cluster,dev]'
	@touch $@

# The whole list, and lvseg without its requirements: on 3.11 those name the other TensorFlow.
.venv-current/.done: setup.cfg pyproject.toml constraints-current.txt
	$(CHECK_PYTHON)
	@echo "installing current TensorFlow and what the tests need (once)"
	$(PYTHON) -m venv .venv-current || { rm -rf .venv-current; exit 1; }
	.venv-current/bin/python $(PIP_INSTALL) --requirement constraints-current.txt
	.venv-current/bin/python $(PIP_INSTALL) --no-deps --editable .
	@touch $@

# Benchmarks, in an environment of their own, since they need the libraries that are compared with. Prints the table;
# make bench BENCH=--update-readme also writes it into benchmarks/README.md.
.PHONY: bench
bench: .venv-bench/.done
	.venv-bench/bin/python benchmarks/run.py $(BENCH)

.venv-bench/.done: setup.cfg pyproject.toml constraints.txt constraints-current.txt constraints-bench.txt
	$(CHECK_PYTHON)
	@echo "installing what the benchmarks need (once)"
	$(PYTHON) -m venv .venv-bench
	PIP_CONSTRAINT="$(call constraints,$(PYTHON)) $(CURDIR)/constraints-bench.txt" \
		.venv-bench/bin/python $(PIP_INSTALL) --editable '.[train,bench]'
	@touch $@
