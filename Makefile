# Each verb creates .venv when it is missing or the project's requirements changed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench clean

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed        ## train a tiny model, sample 160 frames, continue a clip
	$(BIN)/python -m tests.demo

test: .venv/installed        ## the complete tests
	$(BIN)/python -m pytest

check: .venv/installed       ## lint, types, and the tests that take seconds
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m "not slow"

bench: .venv/installed       ## measure what the README claims
	$(BIN)/python -m tests.bench

clean:
	rm -rf .venv demo dist build .mypy_cache .ruff_cache .pytest_cache
