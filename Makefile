# MeshLM: `make demo` and `make test` need Python >= 3.11 and nothing else; all they install goes to .venv.
# pip's own settings (PIP_INDEX_URL and the like) are honoured; PYTHON=/path/to/python picks the interpreter.

SHELL := bash
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOG := $(VENV)/install.log
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-fast lint clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

# OMP_NUM_THREADS: torchrun warns where it is unset; the engine divides the threads among its ranks itself.
demo: $(INSTALLED) ## fetch a small real model and run it on four processes (2 pipeline stages x 2 tensor shards)
	@$(BIN)/python -P -m meshlm.serving.demo_model >/dev/null
	@OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 4 examples/llama_generate.py --tp-size 2 --pp-size 2

# Two files of tests at a time: a file shares its mesh among its tests. JOBS=0: one after the other, in one process.
JOBS := 2

test: $(INSTALLED) ## run all tests (ARGS="-k mesh" goes to pytest)
	@$(BIN)/pytest -n $(JOBS) --dist loadfile $(ARGS)

test-fast: $(INSTALLED) ## run the tests that take no more than a few seconds each
	@$(BIN)/pytest -n $(JOBS) --dist loadfile -m "not slow" $(ARGS)

# mypy cannot follow an editable install whose root has another name than its package, so it gets a folder `meshlm`
# that links to the package's parts.
TYPED := build/typed/meshlm
PARTS := __init__.py __main__.py py.typed $(patsubst %/__init__.py,%,$(wildcard */__init__.py))

lint: $(INSTALLED) ## ruff (lint, format) and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@rm -rf build/typed && mkdir -p $(TYPED)
	@ln -s $(addprefix "$(CURDIR)"/,$(PARTS)) $(TYPED)/
	@MYPYPATH=build/typed $(BIN)/mypy

clean: ## remove the environment and what was built (the model stays in the user's cache)
	@rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the environment ---

# The first interpreter that runs, is new enough and can make an environment. One that is whole already is kept.
CANDIDATES := $(or $(PYTHON),python3.13 python3.12 python3.11 python3)
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

$(BIN)/.made:
	@$(BIN)/python -c 'import pip; $(NEW_ENOUGH)' >/dev/null 2>&1 || { \
	  for python in $(CANDIDATES); do \
	    if "$$python" -c 'import ensurepip, venv; $(NEW_ENOUGH)' >/dev/null 2>&1; then \
	      echo "creating $(VENV) with $$("$$python" --version)"; \
	      exec "$$python" -m venv --clear $(VENV); \
	    fi; \
	  done; \
	  echo "make: no Python >= 3.11 with venv among: $(CANDIDATES) (install one, or name it with PYTHON=...)" >&2; \
	  exit 1; }
	@touch $@

# One line for each large download, the rest in the log; a failed or interrupted run leaves no stamp and is redone.
$(INSTALLED): $(BIN)/.made pyproject.toml setup.py constraints.txt
	@echo "installing MeshLM and its dependencies into $(VENV) (a few minutes the first time; log: $(LOG))"
	@set -o pipefail; \
	$(BIN)/python -m pip install --disable-pip-version-check --no-input -c constraints.txt -e '.[dev]' 2>&1 \
	  | tee $(LOG) | awk '/^ *Downloading .*\(([0-9][0-9.]* GB|[0-9][0-9]+[0-9.]* MB)\)/ { sub(/^ */, "  "); print; fflush() }' \
	  || { tail -n 15 $(LOG) >&2; echo "make: the installation failed (whole log: $(LOG))" >&2; exit 1; }
	@touch $@
