# Two commands for a newcomer, each does all of its own set-up: `make demo` and `make test`.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
JOBS   ?= 2
AUDIT  := build/audit
OSV    := api.osv.dev
export HF_HUB_OFFLINE = 1

.PHONY: demo test lint types docs sbom audit results faults clean

# few of the modules that are installed are ever imported, and these are compiled then
$(STAMP): pyproject.toml constraints.txt
	@echo "instep: installing into $(VENV) (a few minutes the first time)"
	$(PYTHON) -c 'import sys; sys.exit("instep needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

demo: $(STAMP)  ## distil and align the bundled model; before/after table and report.html
	$(BIN)/instep train refl --weight 1 --iterations 30 --model moving-words --out runs/demo

test: $(STAMP)  ## everything CI runs
	$(MAKE) --no-print-directory --jobs=3 lint types docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile

lint: $(STAMP)  ## style, format, and the layers: imports go downward only
	$(BIN)/ruff check src tests benchmarks tools examples
	$(BIN)/ruff format --check src tests benchmarks tools examples
	$(BIN)/lint-imports --no-cache

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)  ## the documentation as a site in build/site; a broken link or anchor fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# an environment of their own, so that the tools are not in what they list
$(AUDIT)/.installed:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --no-compile cyclonedx-bom pip-audit
	@touch $@

sbom: $(STAMP) $(AUDIT)/.installed  ## what is installed, as a CycloneDX bill of materials in build/sbom.json
	$(AUDIT)/bin/cyclonedx-py environment $(BIN)/python --output-reproducible --of JSON -o build/sbom.json

audit: $(STAMP)  ## known weaknesses of what is installed; skipped where their database cannot be reached
	@if $(PYTHON) -c "import socket; socket.create_connection(('$(OSV)', 443), 5)" 2>/dev/null; \
	then $(MAKE) --no-print-directory $(AUDIT)/.installed && \
	  $(AUDIT)/bin/pip-audit --vulnerability-service osv --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; \
	else echo "audit: skipped, $(OSV) cannot be reached"; fi

results: $(STAMP)  ## regenerates docs/results.md and the table of docs/gpu.md from what the benchmarks wrote
	PYTHONPATH=tools $(BIN)/python benchmarks/results.py

clean:
	rm -rf $(VENV) build

faults: $(STAMP)  ## tries every fault in a sandbox and writes docs/faults.md; some ten minutes
	OMP_NUM_THREADS=1 PYTHONPATH=tests:src $(BIN)/python -m faults
