# Needs Python 3.11 or newer with venv and pip, and nothing else. The first target that is made creates
# .venv; the next ones reuse it until a pyproject.toml changes.
#
#   make demo         two recorded programs with three drivers attached, and what they were told
#   make test         the quick tier          ARGS="-k rwsem -x" goes to pytest; -n0 to use one core
#   make test-long    the rest
#   make bench        ratios against peers    ARGS="core locks" picks some
#   make lint types   style; mypy
#   make clean        remove what make and the tools have made, environments included
#
# PYTHON=python3.13 uses another Python, in an environment of its own (.venv-3.13).

ifdef PYTHON
# pyenv runs a version that is not activated only when it is named.
BASE := $(shell PYENV_VERSION=$(patsubst python3.%,3.%,$(filter python3.%,$(PYTHON))) \
    $(PYTHON) -c 'import sys; print(sys.executable)')
ifeq ($(BASE),)
$(error PYTHON=$(PYTHON) does not run)
endif
VENV := .venv-$(shell $(BASE) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
else
BASE := python3
VENV := .venv
endif

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --quiet --disable-pip-version-check
PROJECTS := $(wildcard plugins/*/pyproject.toml)
PLUGINS := $(PROJECTS:/pyproject.toml=)
PEERS := aiorwlock aiosignal blinker culsans frontrun pluggy simloom

.PHONY: demo test test-long bench lint types clean

demo: $(VENV)/.installed
	@mkdir -p build
	@$(RUN) -m mmunotify replay tests/data/traces/sqlite.mmt.xz tests/data/traces/redis.mmt.xz \
	    --driver kvm --driver gru --driver xpmem \
	    --log build/demo.ndjson --report build/demo.html
	@echo "every callback: build/demo.ndjson    as a page: build/demo.html"

test: $(VENV)/.test
	@$(RUN) -m pytest -n auto --maxprocesses 8 --dist worksteal -m "not long" $(ARGS)

test-long: $(VENV)/.test
	@$(RUN) -m pytest -n auto --maxprocesses 8 --dist worksteal -m long $(ARGS)

bench: $(VENV)/.bench
	@$(RUN) -m benchmarks $(ARGS)

lint: $(VENV)/.lint
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check

types: $(VENV)/.test
	@$(RUN) -m mypy

clean:
	rm -rf .venv .venv-* build dist plugins/*/dist .hypothesis .mypy_cache .pytest_cache \
	    .ruff_cache quickstart.ndjson
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.created:
	@echo "Installing into $(VENV)"
	@$(BASE) -m venv $(VENV)
	@$(PIP) 'pip>=25.1'
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml $(PROJECTS)
	@$(PIP) -e '.[all]' $(PLUGINS:%=-e %)
	@touch $@

$(VENV)/.test $(VENV)/.lint: $(VENV)/.%: $(VENV)/.installed
	@$(PIP) --group $*
	@touch $@

$(VENV)/.bench: $(VENV)/.installed
	@for peer in $(PEERS); do \
	    $(PIP) $$peer 2>$@.log || echo "$$peer cannot be installed here: its rows will say so"; done
	@touch $@
