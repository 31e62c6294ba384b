PYTHON ?= python3
BIN := .venv/bin
EXTRAS ?= test

.PHONY: demo test lint clean

demo: .venv/done
	$(BIN)/python examples/quickstart.py --output demo/quickstart.png

test: .venv/done
	$(BIN)/python -m pytest

lint: .venv/done
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/basedpyright

clean:
	rm -rf .venv demo

# The constraints hold for the build backend too, hence the variable and not -c.
.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@
