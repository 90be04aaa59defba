# make install | demo | test | lint | bench; each makes .venv first, if it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test test-fast lint bench rows clean

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/python examples/digits/demo.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -q --durations=15 -n auto --maxprocesses 4 --ignore tests/distributed/test_ray.py
	$(BIN)/python -m pytest -q --durations=5 tests/distributed/test_ray.py  # wants all cores for itself

test-fast: $(STAMP)
	$(BIN)/python -m pytest -q -m "not slow"

# What the benchmarks hold us against is installed only for them; RUN="--repeats 1" for a quick look.
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	$(BIN)/python -m tests.benchmarks.$(subst -,_,$(NAME)) $(RUN)

rows: $(STAMP)
	$(BIN)/python scripts/generate_rows.py

clean:
	rm -rf .venv build dist runs examples/digits/data examples/digits/backbone
