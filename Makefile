# `make demo` trains and evaluates a detector with UBN; `make test` runs the tests. Both set up what they need first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(abspath $(VENV))/bin
USER_PATH := $(PATH)
export PATH := $(BIN):$(PATH)

# Two processes; where one dies, the tests end and name what it ran (with another in its place pytest-xdist hangs).
PYTEST_OPTIONS := -n 2 --max-worker-restart 0
RESULTS := OMP_NUM_THREADS=1 $(BIN)/python tools/analysis_tools/compare_norms.py configs/sweeps/digits.yml --jobs 2 --sweeps

.PHONY: help setup check-gpu demo demo-classification results-classification results-ablation results-condensation results-detection results-padding test test-all docs dist lint lock clean

help:
	@echo 'make demo   train a small Mask R-CNN with UBN on real digits and evaluate it (results in work_dirs/demo)'
	@echo 'make demo-classification   train a small ResNet with BN and with UBN on real digits and compare them'
	@echo 'make results-NAME   the runs of docs/results.md; NAME is classification, ablation, condensation or detection; results-padding those of docs/padding.md'
	@echo 'make test   run the tests; make test-all also runs the few that take minutes'
	@echo 'make check-gpu   see whether the layers are right and fast on this GPU, with a PYTHON that has torch, Triton, pytest'
	@echo 'make docs   build the pages and the API reference as a site (work_dirs/docs/index.html)'
	@echo 'make lint   run ruff, codespell and mypy'
	@echo 'make dist   build wheel and sdist into dist/, install the wheel in a new environment and train with it'
	@echo 'make setup  only make the environment ($(VENV)); VENV=dir and PYTHON=python3.x choose another'
	@echo 'make lock   resolve requirements/*.in again (needs uv)'

setup:
	@$(PYTHON) tools/setup_env.py $(VENV)

demo: setup
	$(BIN)/python tools/demo.py

demo-classification: setup
	$(BIN)/python tools/demo_classification.py

# Two runs at a time with one thread each: the number of threads changes the rounding, and so the numbers.
results-classification: setup
	$(BIN)/python tools/dataset_converters/digits_to_imagefolder.py data/digits-36 --size 36
	$(RESULTS) norms

results-ablation: setup
	$(BIN)/python tools/dataset_converters/digits_to_imagefolder.py data/digits-36 --size 36
	$(RESULTS) threshold components batch-size

results-condensation: setup
	$(BIN)/python tools/dataset_converters/digits_to_imagefolder.py data/digits-36 --size 36
	$(RESULTS) condensation
	$(BIN)/python tools/analysis_tools/plot_condensation.py work_dirs/digits/condensation/*/seed*/ \
	    --out work_dirs/digits/condensation/similarity.png

# The handed-over backbones are those of the classification.
results-detection: results-classification
	$(BIN)/python tools/dataset_converters/digits_to_coco.py data/digits-150 --num-train 150
	$(RESULTS) detection-from-scratch detection-handed-over

results-padding: setup
	$(BIN)/python tools/dataset_converters/digits_to_coco.py data/digits
	OMP_NUM_THREADS=1 $(BIN)/python tools/analysis_tools/compare_norms.py configs/sweeps/padding.yml --jobs 2
	OMP_NUM_THREADS=1 $(BIN)/python tools/analysis_tools/measure_padding.py configs/sweeps/padding.yml --pad 256

test: setup
	$(BIN)/python -m pytest $(PYTEST_OPTIONS) -m 'not slow' $(PYTEST_ARGS)

test-all: setup
	$(BIN)/python -m pytest $(PYTEST_OPTIONS) $(PYTEST_ARGS)

# With the Python of the user, who has a torch for the GPU: no environment is made.
check-gpu:
	@PATH='$(USER_PATH)' $(PYTHON) tools/check_gpu.py $(CHECK_ARGS)

docs: setup
	$(BIN)/python -m sphinx -W --keep-going -q -c docs . work_dirs/docs
	@echo "the site: $(abspath work_dirs/docs/index.html)"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

dist: setup
	$(BIN)/python tools/check_dist.py

# opencv-python needs libGL, which a bare machine lacks; opencv-python-headless gives the same module without it.
# pip, which openmim asks for, is that of the environment.
# === keeps pip from preferring a local build of torch, such as +cpu, beside which torchvision would not import.
lock:
	uv pip compile --universal --python-version 3.10 --no-build-isolation --no-annotate \
	    --no-emit-package opencv-python --no-emit-package pip \
	    --custom-compile-command 'make lock' --upgrade requirements/lock.in -o requirements/lock.txt
	sed -i -E 's/^(torch|torchvision)==/\1===/' requirements/lock.txt
	uv pip compile --universal --python-version 3.10 --no-annotate --custom-compile-command 'make lock' \
	    --upgrade -c requirements/lock.txt requirements/lock-cuda.in -o requirements/lock-cuda.txt

clean:
	rm -rf $(VENV) work_dirs/demo work_dirs/demo.* work_dirs/demo-classification work_dirs/demo-classification.* data/digits data/digits-36 data/digits-150
