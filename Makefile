PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= test
TESTS ?= --ignore=tests/frameworks
WORKERS ?= 2
SEED ?= 0
COUNT ?= 1000

.PHONY: demo test fuzz lint bench scoreboard docs docs-serve clean

demo: $(VENV)/done
	$(BIN)/python examples/quickstart.py --output demo/quickstart.png

# Each worker has one thread, since more would wait for each other.
test: $(VENV)/done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(TESTS)

fuzz: $(VENV)/done
	$(BIN)/python -W error -m tests.differential $(SEED) $(COUNT)

lint: $(VENV)/done
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/basedpyright

bench: $(VENV)/bench
	$(BIN)/python -m benchmarks --page docs/benchmarks.md

# Warnings are errors; NO_MKDOCS_2_WARNING is for an advertisement of the theme.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

docs-serve: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

scoreboard:
	$(MAKE) .venv-frameworks/done VENV=.venv-frameworks EXTRAS=test,frameworks
	.venv-frameworks/bin/python -m tests.frameworks.scoreboard

clean:
	rm -rf .venv .venv-frameworks build demo

# The constraints hold for the build backend too, hence the variable and not -c. torchattacks pins an old requests, which
# it does not import.
$(VENV)/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	$(if $(findstring frameworks,$(EXTRAS)),$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt torchattacks)
	touch $@

# Without its dependencies: what is compared needs neither torchvision nor torchmetrics.
$(VENV)/bench: $(VENV)/done
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --editable '.[bench]'
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --no-deps rai-toolbox
	touch $@

$(VENV)/docs: $(VENV)/done
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@
