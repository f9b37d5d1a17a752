# make demo | make test          (make help lists the rest)
#
#   PYTHON       the interpreter to build on: python3.11 (default), python3.12 or a path to one
#   TORCH_INDEX  a further package index, e.g. PyTorch's for CPU builds (see constraints-cpu.txt)
#   ARGS         passed on: make test ARGS="tests/data -x", make bench-NAME ARGS=--help

SHELL := /bin/bash -o pipefail
MAKEFLAGS += --no-print-directory
PYTHON ?= python3.11
TORCH_INDEX ?=
ARGS ?=

# pyenv's shims start only the version that is switched on; asking for python3.12 means 3.12.
ifneq ($(filter python3.%,$(PYTHON)),)
CHOSEN := PYENV_VERSION=$(PYTHON:python%=%) $(PYTHON)
else
CHOSEN := $(PYTHON)
endif
VERSION := $(shell $(CHOSEN) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)

# One environment per interpreter, made anew when what it is made from changes: the pins and pyproject's
# tables up to ruff's. A checksum in the stamp's name, since git gives old contents new times.
VENV := .venv-$(VERSION)
MADE_FROM := sed '/^.tool.ruff/,$$d' pyproject.toml | cat - constraints-cpu.txt
READY := $(VENV)/ready-$(firstword $(shell $(MADE_FROM) | cksum))
PY := $(VENV)/bin/python
export PYTHONPATH := $(CURDIR)

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format clean

help:  ## this list
	@sed -n 's/^\([a-z%-]*\):.*##/\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; \
		do printf '  make %-10s %s\n' "$$target" "$$text"; done

setup: $(READY)  ## make the environment .venv-VERSION (the other targets do it when needed)

$(READY):
	@case "$(VERSION)" in 3.11|3.12) ;; \
		'') echo "error: '$(PYTHON)' does not run here"; \
		    echo "  -> install Python 3.11 or 3.12, or name one: make PYTHON=/path/to/python3.12"; exit 2;; \
		*)  echo "error: '$(PYTHON)' is Python $(VERSION); this project is tested on 3.11 and 3.12"; \
		    echo "  -> make PYTHON=python3.11, or PYTHON=python3.12"; exit 2;; esac
	@echo "setting up $(VENV) (about 3 minutes, more where torch is downloaded) ..."
	@$(CHOSEN) -m venv --clear $(VENV)
	@$(PY) -m pip install --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		--constraint constraints-cpu.txt --editable '.[dev]' | while read -r verb what _; do \
		case "$$verb" in Collecting|Building|Installing) printf '\r  %-11s%-60.60s' "$$verb" "$$what";; esac; \
		done && echo
	@touch $@
	@echo "ready: $$($(PY) --version), torch $$($(PY) -m pip show torch | sed -n 's/^Version: //p')"

demo: $(READY)  ## dense -> experts -> training on 2 ranks -> export -> tuning, on real data
	$(PY) examples/demo/run.py $(ARGS)

test: $(READY)  ## all tests (CPU, no network)
	OMP_NUM_THREADS=1 $(PY) -m pytest $(ARGS)

lint: $(READY)  ## ruff, ruff format and mypy; changes nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY)  ## put imports and layout right
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench-%: $(READY)  ## run benchmarks/%.py, ours and its peer side by side
	$(PY) benchmarks/$*.py $(ARGS)

clean:  ## remove environments, caches and build products (results/ and runs/ stay)
	rm -rf .venv-3.* build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
