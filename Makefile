# Every target sets up what it needs, once; see `make help`.
#
#   PYTHON  the Python (>= 3.11) that makes the environment; the first suitable one if empty
#   VENV    the environment's folder
#   ARGS    more arguments for the command that a target runs
#   WORKDIR the folder of the run that `make train` makes or goes on with

PYTHON ?=
VENV ?= .venv
ARGS ?=
WORKDIR ?= runs/smoke

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q install
# Each worker compiles on several threads and holds a jax of its own: four at most.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal
# Large buffers in huge pages: on two CPU cores training is up to 1.5 times as fast.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
CANDIDATES := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)

# libtpu, the TPU compiler, stays outside the environment's own packages: there, jax would
# look for chips, and warn at length, in every process of a machine that has none.
ifeq ($(shell uname -sm),Linux x86_64)
TPU_COMPILER := $(VENV)/tpu_compiler/.installed
endif

# jax's CUDA plugin compiles for GPUs on a machine without one. It takes 4.6 GB, and needs a newer
# Python than the project does, so that it has an environment of its own.
GPU_COMPILER := $(VENV)/gpu_compiler
GPU_JAX := jax[cuda13]==0.11.2
NEWER := $(PYTHON) python3 python3.13 python3.12 python3.14

.DEFAULT_GOAL := help
.PHONY: help train setup extras test test-slow test-exhaustive lint gpu-compiler xpk ci clean

help: ## this list
	@echo "usage: make TARGET [ARGS=...] [PYTHON=python3.12] [VENV=.venv312]"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile | expand -t 20

train: $(VENV)/.installed ## the main job: train a small DenseMamba, and report; ARGS="--config.train.steps=10"
	$(BIN)/python -m dense_jax.cli.train --config experiments/smoke.py --workdir "$(WORKDIR)" $(ARGS)
	$(BIN)/python -m dense_jax.cli.report --workdir "$(WORKDIR)"

setup: $(VENV)/.installed-dev $(TPU_COMPILER) ## what `make test` needs and does by itself

test: setup ## the tests that take seconds; ARGS="-k packing"
	$(PYTEST) -m "not slow and not exhaustive" $(ARGS)

test-slow: setup xpk extras ## the tests that take minutes
	$(PYTEST) -m "slow and not exhaustive" $(ARGS)

test-exhaustive: setup ## every form, length and mesh of every family; more than an hour
	$(PYTEST) -m exhaustive $(ARGS)

extras: $(VENV)/.installed-extras ## the optional packages that slow tests need besides

lint: $(VENV)/.installed-dev ## style and types
	$(BIN)/ruff check $(ARGS)
	$(BIN)/mypy

gpu-compiler: $(GPU_COMPILER)/.installed ## the compiler for GPUs (4.6 GB), for `compile --topology h100:1`

xpk: $(VENV)/xpk/.installed ## xpk, which launch/xpk.py runs

ci: ## all of it, on Python 3.11 and 3.12
	.ci/run

clean: ## remove environments and caches; runs/ stays
	rm -rf .venv* .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

# A candidate counts if it can make an environment: some distributions ship Python without
# ensurepip, and a version manager's shim may stand for no Python at all.
$(VENV)/.created:
	@for python in $(CANDIDATES); do \
	  if $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	  then \
	    echo "setting up $(VENV) (once) with $$python, $$($$python -V) ..."; \
	    $$python -m venv $(VENV) && touch $@; exit; \
	  fi; \
	done; \
	echo "error: found no Python >= 3.11 with venv and ensurepip; tried: $(CANDIDATES)." \
	  "Name one: make PYTHON=/path/to/python3" >&2; exit 1

$(VENV)/.installed: $(VENV)/.created requirements.txt pyproject.toml
	@echo "installing requirements.txt into $(VENV) (once) ..."
	@$(PIP) -r requirements.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the tools for tests into $(VENV) (once) ..."
	@$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.installed-extras: $(VENV)/.installed-dev
	@echo "installing the extras hf, eval, parquet and wandb into $(VENV) (once) ..."
	@$(PIP) -e '.[hf,eval,parquet,wandb]'
	@touch $@

# The version that the installed jax asks for in its own extra "tpu".
$(VENV)/tpu_compiler/.installed: $(VENV)/.installed
	@echo "installing the TPU compiler into $(@D) (once) ..."
	@rm -rf $(@D)
	@$(PIP) --no-deps --target $(@D) "$$($(BIN)/python -c 'import importlib.metadata as metadata; \
	  print(next(r.split(";")[0].strip() for r in metadata.requires("jax") \
	  if r.startswith("libtpu")))')"
	@touch $@

$(GPU_COMPILER)/.installed: requirements.txt
ifneq ($(shell uname -sm),Linux x86_64)
	@echo "error: the GPU compiler needs Linux on x86-64; this is $$(uname -sm)" >&2; exit 1
else
	@for python in $(NEWER) ~/.pyenv/versions/3.1[2-9]*/bin/python; do \
	  if $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; \
	  then \
	    echo "installing the GPU compiler into $(@D) (once, 4.6 GB) with $$($$python -V) ..."; \
	    rm -rf $(@D) && $$python -m venv $(@D) && \
	    $(@D)/bin/python -m pip --disable-pip-version-check -q install '$(GPU_JAX)' \
	      -r requirements.txt && touch $@; exit; \
	  fi; \
	done; \
	echo "error: the GPU compiler needs a Python >= 3.12 with venv and ensurepip; tried:" \
	  "$(NEWER). Name one: make gpu-compiler PYTHON=/path/to/python3.12" >&2; exit 1
endif

# Outside the environment: it pins versions of many packages, which ours need not agree with.
$(VENV)/xpk/.installed: $(VENV)/.created
	@echo "installing xpk into $(@D) (once) ..."
	@rm -rf $(@D)
	@$(BIN)/python -m venv $(@D)
	@$(@D)/bin/python -m pip --disable-pip-version-check -q install xpk==1.16.0
	@touch $@
