# make demo   see the main job on the embedded default   (creates .venv, installs, runs)
# make test   what the continuous integration runs: lint, types, tests
#
# Needs Python 3.11 or newer and make; everything is installed into .venv, in the versions of
# constraints.txt. Installing again waits for a change of that file or of pyproject.toml;
# `make clean` starts afresh. Another PyTorch: make TORCH=torch==X.Y.Z CONSTRAINTS= ...

VENV   ?= .venv
DEMO   ?= demo
DIST   ?= dist
EDITS   = $(VENV)/bin/rectiflow evaluate emoji-edits --dtype bfloat16 -o docs/results --overwrite
STRAIGHT = $(VENV)/bin/rectiflow evaluate straight-edits --dtype bfloat16 --overwrite
PYTHON ?= python3.11 python3.12 python3.13 python3.14 python3 python

CONSTRAINTS     ?= constraints.txt
EXTRAS          ?= dev
TORCH           ?= $(shell grep '^torch==' constraints.txt)
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

PY  := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

.DEFAULT_GOAL := help
.PHONY: help demo straighten figures install install-dev test test-slow test-lowest test-newest lock \
  lint types pytest format build clean

help:
	@echo 'make demo       invert and edit bundled pictures, report in $(DEMO)/'
	@echo 'make straighten from the embedded diffusion model to a one-step model, a toy length'
	@echo 'make test       lint, types and the default tests'
	@echo 'make test-slow  the tests that take longer'
	@echo 'make test-lowest, test-newest  the tests with the oldest and the newest allowed dependencies'
	@echo 'make lock       write constraints.txt anew: the newest versions that work together'
	@echo 'make figures    measure everything again and write it into docs/ and the README'
	@echo 'make lint       ruff check, ruff format --check; make types runs mypy'
	@echo 'make format     let ruff rewrite what it can'
	@echo 'make build      wheel and source archive in $(DIST)/, checked'
	@echo 'make clean      remove .venv, caches and what the commands wrote'

demo: install
	$(VENV)/bin/rectiflow demo -o $(DEMO)

straighten: install
	RECTIFLOW=$(VENV)/bin/rectiflow sh examples/straighten.sh

test: lint types pytest

lint: install-dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

types: install-dev
	$(VENV)/bin/mypy

# In the order of the folders: what has few tests, and takes long, is not left for the end.
pytest: install-dev
	$(VENV)/bin/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-slow: install-dev
	$(VENV)/bin/pytest -q -m slow

# Each in an environment of its own, with every extra whose tests need no accelerator.
test-lowest:
	$(MAKE) VENV=.venv-lowest .venv-lowest/lowest.txt
	$(MAKE) VENV=.venv-lowest CONSTRAINTS=.venv-lowest/lowest.txt EXTRAS=all \
	  TORCH="$$(grep '^torch==' .venv-lowest/lowest.txt)" pytest

test-newest:
	rm -rf .venv-newest
	$(MAKE) VENV=.venv-newest CONSTRAINTS= EXTRAS=all pytest

# With the oldest Python, whose versions the newer ones have too. A CUDA build of PyTorch pins its
# own libraries.
lock:
	rm -rf .venv-lock
	$(MAKE) VENV=.venv-lock CONSTRAINTS= EXTRAS=all,bitsandbytes PYTHON=python3.11 install-dev
	{ echo '# Versions tested together, written by `make lock`. Use: pip install -c constraints.txt .'; \
	  .venv-lock/bin/python -m pip freeze --all --exclude pip --exclude rectiflow \
	  | sed -e '/^nvidia-/d' -e '/^cuda-/d' -e '/^triton=/d' -e 's/+[a-z0-9.]*$$//'; } > constraints.txt

figures: demo
	$(VENV)/bin/rectiflow evaluate emoji-models --dtype bfloat16 -o docs/results --overwrite
	$(VENV)/bin/rectiflow evaluate emoji-models --model emoji-sd --dtype bfloat16 -o docs/results --overwrite
	$(PY) benchmarks/pairs.py --json > docs/results/pairs-cost.json
	$(PY) benchmarks/train_step.py --json > docs/results/train-step-cost.json
	$(PY) benchmarks/one_step.py --json > docs/results/one-step-latency.json
	$(VENV)/bin/rectiflow reproduce instaflow --size full --dtype bfloat16 --processes 2
	$(VENV)/bin/rectiflow evaluate inversion-error --model emoji-sd --model emoji-2rf \
	  --model emoji-sd3 --limit 24 --dtype bfloat16 -o docs/results --overwrite
	$(STRAIGHT) --guidance 1 -m emoji-sd -m emoji-2rf \
	  -m runs/reproduce/instaflow-full/students/2rf-of-1024-alpha-2.0/model -o docs/results
	$(STRAIGHT) -o docs/results/guided
	$(EDITS) --tune
	$(EDITS) --tuned docs/results/tuning.json
	$(EDITS) --masks given
	$(EDITS) --ablations
	$(PY) docs/figures.py

format: install-dev
	$(VENV)/bin/ruff check --fix-only --exit-zero
	$(VENV)/bin/ruff format

# With tools of its own: they need nothing of what the package needs.
build:
	$(MAKE) VENV=.venv-build .venv-build/bin/python
	.venv-build/bin/python -m pip --disable-pip-version-check install --quiet build twine
	rm -rf $(DIST)
	.venv-build/bin/python -m build --outdir $(DIST)
	.venv-build/bin/twine check --strict $(DIST)/*

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest .venv-lock .venv-build $(DEMO) build dist .mypy_cache .pytest_cache .ruff_cache

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(PY):
	@for python in $(PYTHON); do \
	  if $$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "creating $(VENV) with $$python"; \
	    exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	echo 'rectiflow needs Python 3.11 or newer with its venv module' \
	  '(Debian, Ubuntu: apt install python3-venv); make PYTHON=/path/to/python ...' >&2; \
	exit 2

# PyPI's Linux wheel of PyTorch carries CUDA, several GB that a machine without a GPU has no use
# for: there PyTorch's own CPU index comes first, if it answers. alarm() bounds the whole question,
# a slow name server included, which urlopen's timeout does not.
ASK_CPU_INDEX = import signal, urllib.request; signal.alarm(8); \
  urllib.request.urlopen("$(TORCH_CPU_INDEX)/torch/", timeout=5)

# PyTorch comes first and alone, so that no other package's wish brings another build of it; what it
# needs comes with the rest. Not isolated, so that the build tool too has the version of the lock.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(PY)
	@if nvidia-smi -L 2>/dev/null | grep -q GPU; then index=; \
	elif $(PY) -c '$(ASK_CPU_INDEX)' >/dev/null 2>&1; then index='--index-url $(TORCH_CPU_INDEX)'; \
	else index=; fi; \
	echo "installing $(TORCH) $$index"; \
	$(PIP) install --no-deps $$index '$(TORCH)' \
	  || { test -n "$$index" && $(PIP) install --no-deps '$(TORCH)'; }
	@echo 'installing rectiflow'
	@$(INSTALL) hatchling
	@$(INSTALL) --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo 'installing the development tools'
	@$(INSTALL) --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

$(VENV)/lowest.txt: pyproject.toml .ci/lowest.py | $(PY)
	$(PY) .ci/lowest.py > $@
