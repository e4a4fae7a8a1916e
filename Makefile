# `make demo` and `make test` need Python 3.11+, make and a package index; g++ makes the CPU scan fast.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# the shipped data never changes, and the runs resume or say that they are done
DIGITS := data/digits/meta.json
TRAFFIC := data/traffic/traffic.csv

PYTEST := $(BIN)/python -m pytest --durations 10
WORKERS := $(shell cores=$$(nproc 2>/dev/null || echo 2); echo $$((cores < 8 ? cores : 8)))

.PHONY: demo test test-fast mutate lint docs-check format clean

demo: $(DIGITS) $(TRAFFIC)
	$(BIN)/mmtrain submit --config vim2_digits --local 1
	$(BIN)/mmtrain submit --config tsm2_traffic --local 1
	@echo
	@$(BIN)/mmtrain runs runs
	@echo
	@echo "Look at the curves:     runs/vim2_digits/curves.png  runs/tsm2_traffic/curves.png"
	@echo "Look at the forecast:   runs/tsm2_traffic/forecast.png"
	@echo "Next:"
	@echo "  . .venv/bin/activate"
	@echo "  mmtrain predict runs/tsm2_traffic data/traffic/traffic.csv --back 48"
	@echo "  mmtrain export runs/vim2_digits --out vim2_digits_export"
	@echo "  mmtrain submit --config vim2_digits --local 2 name=two_processes"
	@echo "  mmtrain submit --config vim2_base_in1k --debug data=synthetic"
	@echo "  mmtrain submit --config vim2_base_in1k --nodes 4 --dry-run"

# The tests that measure time, or keep the deadlines of a cluster, run afterwards, alone.
test: $(STAMP)
	$(PYTEST) --numprocesses $(WORKERS) -m "not timed"
	$(PYTEST) -m timed

test-fast: $(STAMP)
	$(PYTEST) --numprocesses $(WORKERS) -m "not slow and not timed"

mutate: $(STAMP)
	nice -n 19 $(BIN)/python -m tests.mutate --sample 150 --seed 0 --jobs 2
	nice -n 19 $(BIN)/python -m tests.mutate --kernels --jobs 2

lint: $(STAMP) docs-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs-check: $(STAMP)
	$(BIN)/python docs/check.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml setup.py
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

$(DIGITS): | $(STAMP)
	$(BIN)/mmtrain data prepare digits --out data/digits

$(TRAFFIC): | $(STAMP)
	$(BIN)/mmtrain data prepare traffic --out data/traffic

clean:
	rm -rf $(VENV) data runs build *.egg-info mmtrain/ops/cpu/*.so
