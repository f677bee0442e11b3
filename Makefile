PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test bench docs lint clean

demo: $(STAMP)            ## distil a small network on real digits, in minutes
	$(BIN)/stillhouse demo

test: $(STAMP)-test       ## the default suite
	-$(BIN)/stillhouse evidence --check --missing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

bench: $(STAMP)-bench     ## ratios against a hand-written loop and the peers
	$(BIN)/python benchmarks/run.py

docs: $(STAMP)            ## write the generated pages anew
	$(BIN)/python docs/build.py

lint: $(STAMP)-test $(STAMP)-dev  ## style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(STAMP)-%: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) runs
