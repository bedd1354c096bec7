# Everything runs in .venv, which is made where it is absent. `make` lists the targets.

PYTHON ?= python3
# The requirement that puts torch into .venv: the newest, or for example TORCH=torch==2.13.0
TORCH ?= torch
# More arguments for the program a target runs: make test ARGS="-k pack_signs"
ARGS ?=

BIN := .venv/bin
NATIVE := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)

.PHONY: help demo test lint asan tsan fuzz gpu release-check torch

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: .venv/installed  ## train, distill and binarize small networks; print what it brought
	$(BIN)/nncx demo $(ARGS)

test: .venv/installed  ## run the tests, a process a core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

lint: .venv/lint-tools  ## check style and format of Python and C++
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests/emulator -name '*.cpp' -o -name '*.h' -o -name '*.cu')

asan: .venv/installed .venv/build-tools  ## run the native tests under AddressSanitizer and UBSan
	PYTHON=$(BIN)/python scripts/sanitize.sh address $(ARGS)

tsan: .venv/installed .venv/build-tools  ## run the native tests under ThreadSanitizer
	PYTHON=$(BIN)/python scripts/sanitize.sh thread $(ARGS)

fuzz: .venv/installed  ## load 100,000 damaged and forged files
	$(BIN)/python tests/fuzz_files.py $(ARGS)

gpu:  ## build, test and time on this NVIDIA GPU with PYTHON and no network; SANITIZER=memcheck, OUT=folder
	$(PYTHON) scripts/run_on_gpu.py $(if $(SANITIZER),--sanitizer $(SANITIZER)) $(if $(OUT),--out $(OUT)) $(ARGS)

release-check:  ## install in every supported way, in throwaway environments (needs about 20 GB)
	PYTHON=$(PYTHON) scripts/release_check.sh

# Python files are used in place; only native code needs installing again.
.venv/installed: $(NATIVE) | torch
	$(BIN)/pip install --quiet --editable '.[demo,test]'
	touch $@

.venv/lint-tools: pyproject.toml | .venv/made
	$(BIN)/pip install --quiet --group lint
	touch $@

.venv/build-tools: pyproject.toml | .venv/made
	$(BIN)/pip install --quiet setuptools cmake ninja pybind11
	touch $@

# Asked every time, because it depends on $(TORCH); done in a second where nothing is missing.
torch: | .venv/made
	$(BIN)/pip install --quiet '$(TORCH)'

.venv/made:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	touch $@
