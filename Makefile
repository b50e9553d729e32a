# `make quickstart` and `make test` need a python3 with pip and this folder, nothing else: they bring uv
# (.tools/), a Python 3.12 where there is none, and the pinned packages (.venv/); again only when the pins change.

PYTHON  ?= 3.12
WORKERS ?= 2

UV   := .tools/uv
BIN  := .venv/bin
CORE := .venv/.core
DEV  := .venv/.dev

# One thread per process: the models of the tests are small, and two workers share two cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST     := $(ONE_THREAD) HF_HUB_OFFLINE=1 MPLBACKEND=Agg $(BIN)/python -m pytest -q

unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE

.PHONY: help setup quickstart test test-slow test-gpu lint format bench shapes-model wheel lock clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:  ## show this
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

quickstart: $(CORE)  ## a picture model and a robot policy, both embedded, learn by reinforcement; minutes on two CPU cores
	$(BIN)/genpolicy quickstart

test: $(DEV)  ## the tests but the slow ones and those for a GPU (WORKERS=processes)
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not slow and not gpu"

test-slow: $(DEV)  ## the tests that take minutes
	$(PYTEST) -m "slow and not gpu"

test-gpu: $(DEV)  ## the tests that need a CUDA device
	$(PYTEST) -m gpu

lint: $(DEV)  ## ruff, the floors of the house, pyright
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(DEV)  ## sort imports and mend what ruff can mend
	$(BIN)/ruff check --fix .

bench: $(DEV)  ## the numbers that the README claims, from benchmarks/
	@for script in benchmarks/[a-z]*.py; do \
	  if [ -e "$$script" ]; then echo "== $$script"; $(BIN)/python -m "benchmarks.$$(basename "$$script" .py)" || exit 1; fi; \
	done

shapes-model: $(CORE)  ## train the embedded model again, into runs/shapes-sd3
	$(BIN)/python assets/make_shapes_model.py --out runs/shapes-sd3

wheel: $(UV)  ## dist/*.whl and dist/*.tar.gz
	$(UV) build --python $(PYTHON) --out-dir dist

lock: $(UV)  ## resolve all extras anew: constraints.txt and its copy in pyproject.toml
	sed -i.old '/^constraint-dependencies = \[/,/^\]/{/^ /d;}' pyproject.toml
	$(UV) lock --python $(PYTHON) --upgrade
	$(UV) export --python $(PYTHON) --quiet --all-extras --no-emit-project --no-hashes --no-annotate --no-header \
	  --output-file constraints.txt
	sed 's/.*/    "&",/' constraints.txt > .tools/pins
	sed -i.old '/^constraint-dependencies = \[/r .tools/pins' pyproject.toml
	rm -f pyproject.toml.old .tools/pins uv.lock

clean:  ## all that make has made: .venv, .tools, dist, caches
	rm -rf .venv .tools dist .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup: $(DEV)  ## only the environment, with everything the tests need

# A `uv` on the PATH may be a shim that cannot run here, so it is tried. pip runs from / because .python-version
# may name a Python that a version manager does not have.
$(UV):
	@mkdir -p .tools
	@if found=$$(command -v uv) && "$$found" --version >/dev/null 2>&1; then ln -sf "$$found" $@; \
	else echo "Bringing uv into .tools/"; tools=$$PWD/.tools; \
	  (cd / && PIP_USER=0 python3 -m pip install --quiet --upgrade --target "$$tools/site" uv) \
	  && ln -sf site/bin/uv $@ && $@ --version; fi

# Where pip has been told to take its packages from, and uv has not, uv takes them from there too.
PIP_INDEX = $${PIP_INDEX_URL:-$$(cd / && python3 -m pip config get global.index-url 2>/dev/null)}
INSTALL   = index=$${UV_DEFAULT_INDEX:-$${UV_INDEX_URL:-$(PIP_INDEX)}}; $${index:+env UV_DEFAULT_INDEX=$$index} \
  $(UV) pip install --quiet --python $(BIN)/python --constraints constraints.txt

$(CORE): pyproject.toml constraints.txt | $(UV)
	@echo "Setting up .venv/ (some minutes the first time)"
	@$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv \
	  || $(UV) venv --quiet --allow-existing --python '>=3.12,<3.14' .venv
	@$(INSTALL) --editable '.[simulation]'
	@touch $@

$(DEV): $(CORE)
	@$(INSTALL) --editable '.[dev]'
	@touch $@
