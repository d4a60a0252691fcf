# Each verb creates .venv when it is missing or the project's requirements changed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench clean

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed        ## train a tiny model on real digits, sample 160 frames, continue a clip
	rm -rf demo && mkdir demo
	$(BIN)/fdm train --preset micro --batch-size 8 --steps 800 --run demo/run
	$(BIN)/fdm sample --checkpoint demo/run/checkpoints/step-00000800.pt --scheme autoregressive --length 160 \
	  --output demo/sample.gif --sheet
	$(BIN)/fdm extend tests/data/one-digit.gif --checkpoint demo/run/checkpoints/step-00000800.pt --length 64 \
	  --output demo/extended.gif --sheet
	@echo "the model, the videos and their contact sheets (*.sheet.png) are in demo/"

test: .venv/installed        ## the complete tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

check: .venv/installed       ## lint, types, and the tests that take seconds
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m "not slow"

bench: .venv/installed       ## measure what the README claims
	$(BIN)/python -m tests.bench

clean:
	rm -rf .venv demo dist build .mypy_cache .ruff_cache .pytest_cache
