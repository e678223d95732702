# Two commands do everything on a fresh machine: `make run` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
BENCHES := encode decode startup contrastive index softmax soft_nms backends relevance offline_quality find
# Tests share the machine with their own worker processes: one thread each is faster than two that wait for each other.
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: run test check fast claims table models bench clean

run: $(READY)  ## the main job on real pictures; writes report.html
	$(BIN)/ecliptic demo --out report.html

test: check fast  ## lint, types, tests, and whether committed results and docs are fresh
	$(BIN)/python -m ecliptic.core.claims --check
	$(BIN)/python -m ecliptic.core.claims --repeat 1
	$(BIN)/python docs/build.py --check

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

claims: $(READY)  ## every method's claim with its control, all seeds (slow)
	$(BIN)/python -m ecliptic.core.claims run --all --table

table: $(READY)  ## METHODS.md from the result files
	$(BIN)/python -m ecliptic.core.claims --table

models: $(READY)  ## train the built-in models again, from raw sources to committed weights (slow)
	$(BIN)/python -m ecliptic.models.tiny train
	$(BIN)/python -m ecliptic.models.offline train

bench: $(READY)  ## speed against peers, as ratios within one run
	$(BIN)/python -m pip install --quiet -e ".[dev,bench]" -c constraints.txt
	set -e; for name in $(BENCHES); do $(BIN)/python -m benchmarks.$$name; done
	$(BIN)/python docs/build.py

$(READY): pyproject.toml constraints.txt requirements-offline.txt setup.py $(wildcard src/ecliptic/ops/native/softmax*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet -e ".[dev]" -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-offline.txt
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache report.html
