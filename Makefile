# The front door. `make test` and `make demo` work on a fresh checkout: they make the environment and build.
VENV ?= .venv
PY := $(VENV)/bin/python
PYTHON ?= python3
NATIVE := $(shell find csrc CMakeLists.txt pyproject.toml -newer $(VENV)/.built 2>/dev/null | head -1)

.PHONY: help env build demo test test-triton lint type bench docs ci clean

help:  ## what the targets do
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# torch first and pinned: an unpinned torch pulls several gigabytes of CUDA packages.
$(VENV)/.env: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -r constraints.txt
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt "numpy" "pybind11>=2.13" "scikit-build-core>=0.11" "cmake>=3.28" "ninja>=1.11"
	$(PY) .ci/dependencies.py dev | xargs -d '\n' $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt
	touch $@

env: $(VENV)/.env  ## the virtual environment with every dependency

$(VENV)/.built: $(VENV)/.env $(if $(NATIVE),FORCE)
	$(PY) -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

build: $(VENV)/.built  ## the compiled extension, installed editable

FORCE:
