# make demo   the whole of it on a small real data set, about a minute after the set-up
# make test   lint, types and tests
# Both make .venv with Python 3.11 or newer and install what they need. PYTHON=/path/to/python picks one.

VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	"$$p" -c '$(NEW_ENOUGH)' 2>/dev/null && echo "$$p" && break; done)
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e
FRESH = $(BIN)/python -c '$(NEW_ENOUGH)' || { echo "thinet needs Python 3.11 or newer; $(VENV) has" \
	"$$($(BIN)/python --version 2>&1): make clean, then again" >&2; exit 2; }

.PHONY: demo test check format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo-installed
	$(BIN)/thinet demo --out $(OUT) --force

test: check
	$(BIN)/python -m pytest

check: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.test-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "thinet needs Python 3.11 or newer and found none on the path;" \
		"name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c '$(NEW_ENOUGH)' || { echo "thinet needs Python 3.11 or newer;" \
		"$(PYTHON) is $$("$(PYTHON)" --version 2>&1)" >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.demo-installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@$(FRESH)
	$(INSTALL) ".[demo]"
	@touch $@

$(VENV)/.test-installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@$(FRESH)
	$(INSTALL) ".[test]"
	@touch $@ $(VENV)/.demo-installed

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
