# make test | compare | bench | format | clean. Everything runs in .venv, which is made on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: test slow lint compare bench format clean

# One process a core, one thread each: the tests are many and small.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

test: lint
	$(PYTEST)

slow: .venv/ready
	$(PYTEST) --slow

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

compare: .venv/ready
	$(BIN)/fasthyper compare rotation

bench: .venv/ready
	$(BIN)/python benchmarks/cpu.py

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

.venv/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("fasthyper needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
