# make test      prove every method right        (pytest tests)
# make test-all  the slow tests as well          (pytest tests -m "")
# make bench     measure, plot, judge, report    (pytest bench --sweep quick, then the tools)
# make lint      ruff
# Each first makes a virtual environment, .venv, from nothing but python3 and make.
#
# VENV=/opt/venv                    run in this environment as it is, and install nothing into it
# PYTHON=python3.12                 another interpreter for .venv (3.10 or newer)
# PYTEST_ARGS="-k forward -x"       passed on to pytest; a path in it, tests/test_masks.py, is all
#                                   that runs
# SWEEP=n_sweep                     another file of bench/sweeps
# VENV_ARGS=--system-site-packages  .venv keeps the torch that this machine has; nothing is pinned
#                                   then. `make clean` first, if .venv was made without it. Where
#                                   python3 is itself a virtual environment, use VENV instead
# PIP_ARGS=--no-build-isolation     passed on to pip; this one installs without a network, where
#                                   every dependency is there already

PYTHON ?= python3
PYTEST_ARGS ?=
SWEEP ?= quick
VENV_ARGS ?=
PIP_ARGS ?=

ifeq ($(strip $(VENV)),)
PY := .venv/bin/python
READY := .venv/installed
else
PY := $(firstword $(wildcard $(VENV)/bin/python $(VENV)/bin/python3) $(VENV)/bin/python)
READY := given
endif
CONSTRAINTS := $(if $(findstring --system-site-packages,$(VENV_ARGS)),,-c constraints.txt)
# A path in PYTEST_ARGS replaces the folder: pytest would run both.
folder = $(if $(filter $(1)/%,$(PYTEST_ARGS)),,$(1))
# Stamped with the second and claimed by mkdir, so that no run overwrites another.
RUN := build/bench/$(shell date -u +%Y%m%dT%H%M%SZ)-$(basename $(notdir $(SWEEP)))

.PHONY: test test-all bench lint clean given
.DEFAULT_GOAL := test

test: $(READY)
	$(PY) -m pytest $(call folder,tests) $(PYTEST_ARGS)

# pytest.ini leaves the slow tests out; an empty -m takes all.
test-all: $(READY)
	$(PY) -m pytest $(call folder,tests) -m "" $(PYTEST_ARGS)

# A case that fails makes the end fail, and still leaves the report of those that passed.
bench: $(READY)
	@mkdir -p build/bench && mkdir $(RUN)
	@status=0; \
	$(PY) -m pytest $(call folder,bench) --sweep $(SWEEP) --results $(RUN).json $(PYTEST_ARGS) || status=$$?; \
	if [ -s $(RUN).json ]; then \
	    for tool in plot verdict report; do \
	        $(PY) -m tools.$$tool $(RUN).json --out $(RUN) || status=$$?; \
	    done; \
	    echo "results: $(RUN).json"; \
	    echo "plots, verdict, report: $(RUN)/"; \
	    [ ! -f $(RUN)/report.html ] || echo "open $(RUN)/report.html"; \
	else \
	    rmdir $(RUN); echo "no case was measured: no results, no report" >&2; \
	    [ $$status -ne 0 ] || status=1; \
	fi; \
	exit $$status

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# Results in build/bench stay, and so does an environment that was given.
clean:
	rm -rf .venv build/lib build/bdist.* build/pip.log *.egg-info
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# VENV=...: one error that names all it lacks.
NEEDS := torch pytest pytest_benchmark yaml matplotlib
test test-all: NEEDS += hypothesis
lint: NEEDS := ruff
CHECK := import sys; from importlib.util import find_spec; \
    lacks = ["Python 3.10 or newer"] if sys.version_info < (3, 10) else []; \
    lacks += [name for name in sys.argv[2:] if not find_spec(name)]; \
    sys.exit(lacks and "VENV=" + sys.argv[1] + ": its python lacks " + ", ".join(lacks) \
        + ". Name an environment that has them, or leave VENV out: make then makes .venv" or 0)

given:
	@[ -x "$(PY)" ] || { \
	    echo "VENV=$(VENV): no bin/python there. Name the folder of a Python environment, or leave" \
	         "VENV out: make then makes .venv" >&2; exit 1; }
	@$(PY) -c '$(CHECK)' "$(VENV)" $(NEEDS)

# Pip is quiet unless it fails.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "Block-Shock needs Python 3.10 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	         "name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) cannot make virtual environments: venv or ensurepip is missing;" \
	         "install it (Debian and Ubuntu: apt install python3-venv)," \
	         "or name another: make PYTHON=python3.12" >&2; exit 1; }
	@echo "making .venv (the first time this installs torch, which takes minutes)"
	@$(PYTHON) -m venv $(VENV_ARGS) .venv
	@mkdir -p build
	@$(PY) -m pip install $(PIP_ARGS) $(CONSTRAINTS) -e '.[dev]' >build/pip.log 2>&1 || { \
	    cat build/pip.log >&2; echo "pip failed; the same is in build/pip.log" >&2; exit 1; }
	@touch $@
