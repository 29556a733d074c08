# make test    prove every method right        (pytest tests)
# make bench   measure, plot, judge, report    (pytest bench --sweep quick, then the tools)
# make lint    ruff
# Each first makes its own virtual environment, .venv, from nothing but python3 and make.
#
# PYTHON=python3.12                 another interpreter (3.10 or newer)
# PYTEST_ARGS="-k forward -x"       passed on to pytest
# SWEEP=n_sweep                     another file of bench/sweeps
# VENV_ARGS=--system-site-packages  keep the torch this machine already has; nothing is pinned then.
#                                   `make clean` first, if .venv was made without it
# PIP_ARGS=--no-build-isolation     passed on to pip; this one installs without a network, where
#                                   every dependency is there already

PYTHON ?= python3
PYTEST_ARGS ?=
SWEEP ?= quick
VENV_ARGS ?=
PIP_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
CONSTRAINTS := $(if $(findstring --system-site-packages,$(VENV_ARGS)),,-c constraints.txt)
# Stamped with the second and claimed by mkdir, so that no run overwrites another.
RUN := build/bench/$(shell date -u +%Y%m%dT%H%M%SZ)-$(basename $(notdir $(SWEEP)))

.PHONY: test bench lint clean
.DEFAULT_GOAL := test

test: $(STAMP)
	$(BIN)/python -m pytest tests $(PYTEST_ARGS)

# A case that fails makes the end fail, and still leaves the report of those that passed.
bench: $(STAMP)
	@mkdir -p build/bench && mkdir $(RUN)
	@status=0; \
	$(BIN)/python -m pytest bench --sweep $(SWEEP) --results $(RUN).json $(PYTEST_ARGS) || status=$$?; \
	if [ -s $(RUN).json ]; then \
	    for tool in plot verdict report; do \
	        $(BIN)/python -m tools.$$tool $(RUN).json --out $(RUN) || status=$$?; \
	    done; \
	    echo "results: $(RUN).json"; \
	    echo "plots, verdict, report: $(RUN)/"; \
	    [ ! -f $(RUN)/report.html ] || echo "open $(RUN)/report.html"; \
	else \
	    rmdir $(RUN); echo "no case was measured: no results, no report" >&2; \
	    [ $$status -ne 0 ] || status=1; \
	fi; \
	exit $$status

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Results in build/bench stay.
clean:
	rm -rf $(VENV) build/lib build/bdist.* *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "Block-Shock needs Python 3.10 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	         "name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) cannot make virtual environments: venv or ensurepip is missing;" \
	         "install it (Debian and Ubuntu: apt install python3-venv)," \
	         "or name another: make PYTHON=python3.12" >&2; exit 1; }
	@echo "making $(VENV) (the first time this installs torch)"
	@$(PYTHON) -m venv $(VENV_ARGS) $(VENV)
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) $(CONSTRAINTS) -e '.[dev]'
	@touch $@
