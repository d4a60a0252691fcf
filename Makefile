# Each verb creates .venv when it is missing or the project's requirements changed.
PYTHON ?= python3
BIN := .venv/bin
PARALLEL := --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: demo test check bench clean

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed        ## sample 160 frames with the bundled model, continue a clip
	rm -rf demo && mkdir demo
	$(BIN)/fdm sample --scheme autoregressive --length 160 --seed 1 --scale 4 --output demo/sample.gif --sheet
	$(BIN)/fdm extend tests/data/two-digits.gif --use-last 8 --length 64 --seed 1 --scale 4 --output demo/extended.gif --sheet
	@echo "the videos and their contact sheets (*.sheet.png) are in demo/"

test: .venv/installed        ## the complete tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)

check: .venv/installed       ## lint, types, and the tests that take seconds
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" $(PARALLEL)

bench: .venv/installed       ## measure speed and memory
	$(BIN)/python -m tests.bench

clean:
	rm -rf .venv demo dist build .mypy_cache .ruff_cache .pytest_cache
