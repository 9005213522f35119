# Two commands for a newcomer, each does all of its own set-up: `make demo` and `make test`.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
JOBS   ?= 2
DEMO   ?= moving-digits
export HF_HUB_OFFLINE = 1

.PHONY: demo test lint types results faults clean

$(STAMP): pyproject.toml constraints.txt
	@echo "instep: installing into $(VENV) (a few minutes the first time)"
	$(PYTHON) -c 'import sys; sys.exit("instep needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch==2.13.0"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

demo: $(STAMP)  ## distil and align the bundled model; before/after table and report.html
	$(BIN)/instep train dm-align-group --model $(DEMO) --out runs/demo

test: $(STAMP) lint types  ## everything CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile

lint: $(STAMP)  ## style, format, and the layers: imports go downward only
	$(BIN)/ruff check src tests benchmarks tools examples
	$(BIN)/ruff format --check src tests benchmarks tools examples
	$(BIN)/lint-imports --no-cache

types: $(STAMP)
	$(BIN)/mypy

results: $(STAMP)  ## regenerates docs/results.md and the table of docs/gpu.md from what the benchmarks wrote
	PYTHONPATH=tools $(BIN)/python benchmarks/results.py

clean:
	rm -rf $(VENV)

faults: $(STAMP)  ## tries every fault in a sandbox and writes docs/faults.md; some ten minutes
	OMP_NUM_THREADS=1 PYTHONPATH=tests:src $(BIN)/python -m faults
