# Python 3.11 or newer and make are all that these need.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
READY := .venv/.ready
WORKERS ?= 2

.PHONY: demo test lint snapshots clean

demo: $(READY)  ## profile, plan and train the example, with every tier in use
	@$(BIN)/python examples/demo.py

test: $(READY)  ## run the tests, in two processes or WORKERS=number
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(READY)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

snapshots: $(READY)  ## accept the dashboard's pictures as they are now
	$(BIN)/python -m pytest tests/test_tui_app.py --snapshot-update

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "memplan needs Python 3.11 or newer; install it, or say make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "setting up .venv with $(PYTHON); PyTorch is a large download the first time"
	@$(PYTHON) -m venv .venv || { echo "this Python can not make virtual environments; on Debian: apt-get install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

clean:  ## remove what the others made
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
