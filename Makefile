# Every target sets itself up: a virtual environment in $(VENV), filled with the versions of constraints.txt.

VENV ?= .venv
PYTHON ?= python3
BUDGET ?= 2m
PYTEST_ARGS ?= -q
# tests side by side, one thread each
WORKERS ?= 2
BENCHMARKS ?= $(wildcard benchmarks/bench_*.py)

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -c constraints.txt
DEMO_READY := $(VENV)/.ready-demo
TEST_READY := $(VENV)/.ready-test

.DEFAULT_GOAL := help
.PHONY: help demo test lint types docs fast real nightly audit gpu tree bench bench-predict bench-search bench-sensitivity models catalogue clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1 \2/p' Makefile | awk '{printf "  make %-18s", $$2; $$1 = $$2 = ""; print $$0}'

demo: $(DEMO_READY) ## search the shipped demo model for $(BUDGET) and print the front
	$(BIN)/autoprec search demo --budget $(BUDGET)

test: lint types docs ## lint, types, docs and all tests but real, nightly and gpu
	$(BIN)/python -m pytest $(PYTEST_ARGS) -n $(WORKERS) --dist worksteal

lint: $(TEST_READY) ## ruff, check and format
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(TEST_READY) ## mypy, strict
	$(BIN)/python -m mypy

docs: $(TEST_READY) ## the documentation as pages, in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

fast: $(TEST_READY) ## the tests that take seconds
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow and not real and not nightly and not gpu"

real: models ## the tests on real trained models
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PYTEST_ARGS) -m "real and not nightly and not gpu"

nightly: models ## all tests on real trained models, the long ones too, the report in a browser and the notebook
	$(INSTALL) -e '.[nightly]'
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PYTEST_ARGS) -n $(WORKERS) --dist worksteal --timeout 7200 -m "(nightly or real) and not gpu"

audit: $(TEST_READY) ## known vulnerabilities of the versions in constraints.txt (pip-audit, in .venv-audit), and licences
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install -q pip-audit
	$(BIN)/python scripts/licences.py
	$(VENV)-audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt

gpu: $(TEST_READY) ## on a machine with a card: its tests, then measure it and check emulation and predictions; five minutes
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "gpu"
	$(BIN)/python scripts/gpu_check.py

bench: $(TEST_READY) ## run the benchmarks and write benchmarks/results/
	@set -e; for script in $(BENCHMARKS); do echo "$(BIN)/python $$script"; $(BIN)/python $$script; done

bench-sensitivity: models ## predicted drops against the recorded true ones, and the predicted front; half an hour
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/bench_sensitivity.py

bench-search: models ## samplers on an exhaustive truth, and the verdict's error rates, simulated; half an hour
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_sampler.py
	$(BIN)/python benchmarks/bench_verdict.py

tree: models ## train small models, solve fronts, and write profiles/runs/ and profiles/tree.json anew; an hour
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/small_models.py
	$(BIN)/python benchmarks/tree_table.py
	$(BIN)/python benchmarks/bench_regret.py

bench-predict: $(TEST_READY) ## predicted times against public measurements in $$AUTOPREC_PUBLIC_DATA, each card left out; three minutes
	$(BIN)/python benchmarks/bench_predict.py

models: $(TEST_READY) ## prepare the trained models and texts of the real tests
	$(BIN)/python benchmarks/models.py

catalogue: $(TEST_READY) ## write profiles/models/*.json anew, after a change of a model or of transformers
	$(BIN)/python benchmarks/catalogue.py

clean: ## remove the environment, caches and builds; run folders stay
	rm -rf $(VENV) $(VENV)-audit build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A mark holds the folder it was made in: an environment that was moved, or lost its Python, is made again.
define whole
$(shell $(BIN)/python -P -c 'import autoprec, pip; print(open("$(1)").read().strip())' 2>/dev/null)
endef
ifneq ($(call whole,$(DEMO_READY)),$(CURDIR))
.PHONY: $(DEMO_READY)
endif
ifneq ($(call whole,$(TEST_READY)),$(CURDIR))
.PHONY: $(TEST_READY)
endif

define environment
@$(PYTHON) -c 'import sys; sys.exit("autoprec needs Python 3.11 or newer, this is %d.%d; try make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
@rm -f $@
@$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
endef

$(DEMO_READY): pyproject.toml constraints.txt
	$(environment)
	$(INSTALL) -e .
	@echo "$(CURDIR)" > $@

$(TEST_READY): pyproject.toml constraints.txt
	$(environment)
	$(INSTALL) -e '.[test]'
	@echo "$(CURDIR)" | tee $(DEMO_READY) > $@
