# Every target sets up what it needs: a virtual environment in .venv with versions from constraints.txt.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# More threads than idle cores make small tensors slower, not faster.
export OMP_NUM_THREADS ?= 1

.PHONY: help install demo test lint types wheel bench peers clean

help:
	@echo "make demo    install, then run the demonstration (runs/demo/report.html)"
	@echo "make test    install, then run the tests"
	@echo "make lint    ruff;  make types  mypy;  make wheel  build and check the wheel;  make bench  benchmarks"
	@echo "make peers   the checks on other symmetrisation tools, in an environment of their own (runs/peers)"

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, got " + sys.version)'
	$(PYTHON) -m venv $(VENV)

# The stamp names what was installed, so that a changed list of packages installs again.
$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/symmetrize demo --output runs/demo

# Two files of tests at a time: each worker takes about a gigabyte.
WORKERS ?= 2
test: install
	$(BIN)/pytest -n $(WORKERS) --dist loadfile

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: install
	$(BIN)/mypy symmetrize backbones

wheel: install
	rm -rf dist build
	$(BIN)/python -m build -q --no-isolation --wheel
	$(BIN)/python tests/check_wheel.py dist/*.whl

bench: install
	$(BIN)/python -m benchmarks --output runs/bench

# An environment of its own is made in runs/peers/environment; this one only starts it.
peers: install
	$(BIN)/python -m benchmarks.peers --output runs/peers

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
