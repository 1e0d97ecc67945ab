# Everything that is done with a checkout.  `make` alone says what there is.
#
# BERTH_STATE    the state folder (default /var/lib/berth)
# DATABASE_URL, REDIS_URL, S3_ENDPOINT_URL (with S3_ACCESS_KEY_ID, S3_SECRET_ACCESS_KEY, S3_BUCKET)
#                existing servers to use instead of private ones

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Root is needed to make users, mounts and network; sudo keeps the settings named above.
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo --preserve-env=BERTH_STATE,BERTH_BIND,BERTH_DOMAIN,BERTH_SSH_BIND,BERTH_SSH_TLS_BIND,BERTH_WARM,BERTH_POOL_GB,DATABASE_URL,REDIS_URL,S3_ENDPOINT_URL,S3_ACCESS_KEY_ID,S3_SECRET_ACCESS_KEY,S3_BUCKET,S3_REGION)

.PHONY: help venv up down uninstall prove test bench chaos lint schema

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

venv: $(STAMP)  ## the virtual environment with the pinned libraries

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is needed (Debian 12: apt-get install python3.11 python3.11-venv), or say PYTHON=/path/to/python3.11"; exit 1; }
	@mkdir -p $(VENV)
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  echo "installing python3.11-venv: making virtual environments"; \
	  words=$$($(AS_ROOT) sh -c 'export DEBIAN_FRONTEND=noninteractive; apt-get update -qq && apt-get install -yqq --no-install-recommends python3.11-venv' 2>&1) \
	    || { echo "$$words"; exit 1; }; \
	  echo python3.11-venv >$(VENV)/debian-packages; }
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@$(RUN) -P -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*p["dependencies"], *p["optional-dependencies"]["dev"], sep="\n")' >$(VENV)/requirements.txt
	@echo "installing the Python libraries named in pyproject.toml into $(VENV); a dot for each"
	@set -o pipefail; $(RUN) -P -m pip install --disable-pip-version-check --no-cache-dir --requirement $(VENV)/requirements.txt \
	  | while read -r what _; do case $$what in Collecting) printf .;; Installing) printf ' unpacking';; esac; done || exit 1; echo
	@touch $(STAMP)

up: venv  ## start everything on this machine, with a first devbox; Ctrl-C stops it
	@exec $(AS_ROOT) $(RUN) -m config.up

down: venv  ## stop what `make up` runs elsewhere
	@$(AS_ROOT) $(RUN) -m config.down

uninstall: venv  ## remove every trace from this machine but the Debian packages
	@$(AS_ROOT) $(RUN) -m config.uninstall

prove: venv  ## drive a throwaway copy through every operation with the published SDK
	@$(AS_ROOT) $(RUN) -m config.prove

test: venv  ## every test, those on real boxes too (root)
	@$(AS_ROOT) $(RUN) -m config.packages
	@$(AS_ROOT) $(RUN) -m pytest $(ARGS)

bench: venv  ## speed and memory: tables, and build/bench.json (root)
	@$(AS_ROOT) $(RUN) -m tests.bench $(ARGS)

chaos: venv  ## kill everything at random under load: SEED=, LENGTH= (seconds), COMMANDS= (at once)
	@$(AS_ROOT) $(RUN) -m tests.chaos $(if $(SEED),--seed $(SEED)) $(if $(LENGTH),--seconds $(LENGTH)) $(if $(COMMANDS),--commands $(COMMANDS)) $(ARGS)

lint: venv  ## ruff, mypy and the import rules
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy .
	@$(VENV)/bin/lint-imports

schema: venv  ## write openapi.yaml from the code
	@$(RUN) manage.py spectacular --file openapi.yaml --validate
