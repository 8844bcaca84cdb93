# make train: from nothing to a trained checkpoint. make test: from nothing to a checked tree.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := $(wildcard constraints.txt)

.PHONY: train test lint wheel kernels clean

train: $(VENV)/.installed
	$(BIN)/seqzoo-train $(ARGS)

test: $(VENV)/.installed
	$(BIN)/pytest -q -n 2 $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

wheel: $(VENV)/.installed
	$(BIN)/pytest -q -m wheel tests/test_wheel.py

kernels: $(VENV)/.installed
	$(BIN)/python -m seqzoo.kernels.gpu.report --known benchmarks/results/kernels.json --again 8

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check $(CONSTRAINTS:%=-c %) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info runs
