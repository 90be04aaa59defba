# make install | demo | test | test-cluster | lint | bench | picture | settings; each makes .venv first, if it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test test-most test-ray test-long test-cluster test-fast fuzz chaos lint bench rows picture settings \
  clean

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

# One more than cores, as tests wait now and then; 4 at most, each takes a gigabyte.
PROCESSES = $(shell cores=$$(nproc 2> /dev/null || echo 3); echo $$((cores < 4 ? cores + 1 : 4)))

# All parts run, one after the other, whatever the first ones say; it fails in the end if one did.
test: $(STAMP)
	@$(MAKE) --no-print-directory --keep-going --jobs=1 lint test-most test-ray

test-most: $(STAMP)
	$(BIN)/python -m pytest -q --durations=15 -n $(PROCESSES) --every-reason -m "not cluster and not long" \
	  --ignore tests/distributed

test-ray: $(STAMP)  # wants all cores for itself
	$(BIN)/python -m pytest -q --durations=5 -m "not cluster" tests/distributed

# What needs several machines, made of this one, or Ray for minutes: as root, each has a network of its own (cluster/local.py).
# At most 40 minutes. KUBERAY_CRDS names a folder with KubeRay's ray.io_rayclusters.yaml and ray.io_rayjobs.yaml, for the manifests.
# Two at a time: they wait for nodes that go and come, and cores are idle for most of it.
test-cluster: $(STAMP)
	SHARE_CORES=1 $(BIN)/python -m pytest -q --durations=15 -n 2 --dist loadfile -m cluster

# Every model type of transformers and timm (after a row of a plugin or a library changed), and every kind and moment of
# which `test` takes some.
test-long: $(STAMP)
	$(BIN)/python -m pytest -q --durations=5 -n $(PROCESSES) -m "long and not cluster" \
	  --ignore tests/distributed

test-fast: $(STAMP)
	$(BIN)/python -m pytest -q -m "not slow and not cluster and not long"

# The fuzz tests with many more inputs than `test` gives them; some ten minutes.
fuzz: $(STAMP)
	FUZZ_NUM=2000 $(BIN)/python -m pytest -q -n auto --timeout=3000 tests/data/test_fuzz.py tests/data/test_fuzz_tables.py \
	  tests/whole/test_predictor_fuzz.py tests/gate/test_fuzz_backbones.py

# Real processes hurt at ROUNDS random moments a row, some a run; ROWS=worker,driver for some of them.
ROUNDS ?= 5
chaos: $(STAMP)
	@$(BIN)/python -m tests.chaos --rounds $(ROUNDS) $(if $(ROWS),--rows $(ROWS))

# What the benchmarks hold us against is installed only for them; RUN="--repeats 1" for a quick look.
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	$(BIN)/python -m tests.benchmarks.$(subst -,_,$(NAME)) $(RUN)

rows: $(STAMP)
	$(BIN)/python scripts/generate_rows.py

# docs/wings.svg, from the code; a test holds the two together.
picture: $(STAMP)
	$(BIN)/python scripts/draw_wings.py

# docs/settings.md, from the models; a test holds the two together.
settings: $(STAMP)
	$(BIN)/python scripts/write_settings.py

clean:
	rm -rf .venv build dist runs examples/digits/data examples/digits/backbone
