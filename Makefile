# make app: set up, fetch the embedded model once, open the app.   make test, make lint: what CI runs.
# make results: the figures of all shipped checkpoints anew (an hour).
# make faults: the table of docs/reliability.md.   make slow: tests that take too long for make test.
# make bench: the tables of benchmarks/README.md (the better part of an hour on two cores; the app's want Chromium).
.PHONY: app test lint format bench faults slow results

# The first Python on the PATH that the pinned packages support (3.10 to 3.14); PYTHON=... overrides.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin

app: $(VENV)/app.stamp
	$(BIN)/python -m trainer.embedded
	$(BIN)/streamlit run app.py

test: $(VENV)/test.stamp
	$(BIN)/python -m trainer.embedded
	$(BIN)/python -m pytest -n 2 $(PYTEST)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.audit

faults: $(VENV)/test.stamp
	$(BIN)/python -m trainer.embedded
	$(BIN)/python -m pytest -n 2 -m '' tests/faults --reliability=docs/reliability.md

slow: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 -m slow --ignore=tests/faults

results: $(VENV)/test.stamp
	$(BIN)/python -m trainer.embedded
	$(BIN)/python -m pytest tests/results

bench: $(VENV)/test.stamp
	$(BIN)/python -m trainer.embedded
	$(BIN)/python -m benchmarks.steps
	$(BIN)/python -m benchmarks.busy
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.cost
	$(BIN)/python -m benchmarks.analysis
	$(BIN)/python -m benchmarks.first_run
	$(BIN)/python -m benchmarks.redundancy checkpoints/*-x8-k32
	$(BIN)/python -m benchmarks.circuit_time checkpoints/*-x4-k32
	$(BIN)/python -m benchmarks.results_table checkpoints docs/frontier --names '*-L17-*-x8-*' '*-dense-*' --frontier '*-batchtopk-x8-k*'
	$(BIN)/python -m benchmarks.app
	$(BIN)/python -m benchmarks.beside

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.10 to 3.14 is needed; none was found (set PYTHON=/path/to/python)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/app.stamp: requirements.txt | $(BIN)/python
	$(BIN)/pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

$(VENV)/test.stamp: requirements.txt tests/requirements.txt | $(BIN)/python
	$(BIN)/pip install --disable-pip-version-check -q -r tests/requirements.txt
	touch $@
