# Nothing but Python and make is needed. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint docs screenshots format clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

demo: $(STAMP) ## the loop on built-in phantom data, no download; report in runs/phantom/report.html
	@$(PY) -m kmine.loop --rounds 3 --model.encoder_weights none --fit.steps 200 --fit.round_steps 100 --crossfit 1 --adapt.folds 1

# Bytecode is kept, as two processes and those that they start read the same files; neighbours share their fixtures.
test: lint ## style first, then all tests; KMINE_TEST_DATA names the folder of real data, if any
	@PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

lint: $(STAMP) ## ruff, without changing a file
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --check --quiet . || { echo "not formatted: run 'make format'"; exit 1; }

docs: $(STAMP) ## the documentation site, in docs/_build/index.html
	@$(PY) -m sphinx -W -q docs docs/_build && echo "docs/_build/index.html"

screenshots: $(STAMP) ## pictures of all pages for the documentation; needs Chromium
	@$(PY) docs/screenshots.py

format: $(STAMP) ## ruff, changing what it can
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean: ## remove the environment and every cache; runs/ stays
	rm -rf $(VENV) build dist docs/_build docs/_generated *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an interrupted install is taken up again. pip marks a package whole by its INSTALLER file,
# written after all others; a package without one was cut off while unpacking, and is forgotten so that pip unpacks it anew.
$(STAMP): pyproject.toml
	@echo "Installing kmine and its tests into $(VENV): about 6 GB and a few minutes the first time."
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo "Creating $(VENV) ..."; $(PYTHON) -m venv --clear $(VENV); }
	@for info in $(VENV)/lib/python*/site-packages/*.dist-info; do \
	  [ ! -d "$$info" ] || [ -f "$$info/INSTALLER" ] || { echo "Repairing $$info"; rm -rf "$$info"; }; \
	done
	$(PY) -m pip install --disable-pip-version-check -e ".[test,onnx]"
	@touch $@
