PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= test
TESTS ?= --ignore=tests/frameworks
WORKERS ?= 2
SEED ?= 0
COUNT ?= 1000
CONSTRAINTS ?= constraints.txt
INSTALL = PIP_CONSTRAINT=$(CONSTRAINTS) $(BIN)/python -m pip install --quiet

.PHONY: demo test test-torch coverage fuzz lint format bench scoreboard docs docs-serve dist clean

demo: $(VENV)/done
	$(BIN)/python examples/quickstart.py --output demo/quickstart.png

# Each worker has one thread, since more would wait for each other.
test: $(VENV)/done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(TESTS)

# The tests with another torch, TORCH=2.6.0, in an environment of its own. Some need another sympy or setuptools.
test-torch:
	mkdir -p .venv-torch-$(TORCH)
	sed '/^sympy==/d; /^setuptools==/d; s/^torch==.*/torch==$(TORCH)/' constraints.txt > .venv-torch-$(TORCH)/constraints.txt
	$(MAKE) test VENV=.venv-torch-$(TORCH) CONSTRAINTS=.venv-torch-$(TORCH)/constraints.txt

# Less than all tests: some interrupt a step at each of its lines, and coverage, which traces lines as they do, stops there.
coverage: $(VENV)/coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal --cov \
		--ignore=tests/adapters/test_errors_in_flight.py $(TESTS)

fuzz: $(VENV)/done
	$(BIN)/python -W error -m tests.differential $(SEED) $(COUNT)

lint: $(VENV)/done
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/basedpyright

format: $(VENV)/done
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

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

dist: $(VENV)/dist
	VENV=$(VENV) .ci/dist

clean:
	rm -rf .venv .venv-* build demo dist

# The constraints hold for the build backend too, hence the variable and not -c. torchattacks pins an old requests, which
# it does not import.
$(VENV)/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[$(EXTRAS)]'
	$(if $(findstring frameworks,$(EXTRAS)),$(INSTALL) --no-deps torchattacks)
	touch $@

# Without its dependencies: what is compared needs neither torchvision nor torchmetrics.
$(VENV)/bench: $(VENV)/done
	$(INSTALL) --editable '.[bench]'
	$(INSTALL) --no-deps rai-toolbox
	touch $@

$(VENV)/coverage $(VENV)/dist $(VENV)/docs: $(VENV)/done
	$(INSTALL) --editable '.[$(@F)]'
	touch $@
