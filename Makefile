# `make demo` trains and evaluates a detector with UBN; `make test` runs the tests. Both set up what they need first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)

.PHONY: help setup demo demo-classification test test-all lint lock clean

help:
	@echo 'make demo   train a small Mask R-CNN with UBN on real digits and evaluate it (results in work_dirs/demo)'
	@echo 'make demo-classification   train a small ResNet with BN and with UBN on real digits and compare them'
	@echo 'make test   run the tests; make test-all also runs the few that take minutes'
	@echo 'make lint   run ruff and codespell'
	@echo 'make setup  only make the environment ($(VENV)); VENV=dir and PYTHON=python3.x choose another'
	@echo 'make lock   resolve requirements/*.in again (needs uv)'

setup:
	@$(PYTHON) tools/setup_env.py $(VENV)

demo: setup
	$(BIN)/python tools/demo.py

demo-classification: setup
	$(BIN)/python tools/demo_classification.py

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m 'not slow' $(PYTEST_ARGS)

test-all: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

# opencv-python needs libGL, which a bare machine lacks; opencv-python-headless gives the same module without it.
# === keeps pip from preferring a local build of torch, such as +cpu, beside which torchvision would not import.
lock:
	uv pip compile --universal --python-version 3.10 --no-build-isolation --no-annotate --no-emit-package opencv-python \
	    --custom-compile-command 'make lock' --upgrade requirements/lock.in -o requirements/lock.txt
	sed -i -E 's/^(torch|torchvision)==/\1===/' requirements/lock.txt
	uv pip compile --universal --python-version 3.10 --no-annotate --custom-compile-command 'make lock' \
	    --upgrade -c requirements/lock.txt requirements/lock-cuda.in -o requirements/lock-cuda.txt

clean:
	rm -rf $(VENV) work_dirs/demo work_dirs/demo-classification data/digits
