# `make demo` trains and evaluates a detector with UBN; `make test` runs the tests. Both set up what they need first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(abspath $(VENV))/bin
USER_PATH := $(PATH)
export PATH := $(BIN):$(PATH)

# Two processes; where one dies, the tests end and name what it ran (with another in its place pytest-xdist hangs).
PYTEST_OPTIONS := -n 2 --max-worker-restart 0
RESULTS := OMP_NUM_THREADS=1 $(BIN)/python tools/analysis_tools/compare_norms.py configs/sweeps/digits.yml --jobs 2 --sweeps
COST := OMP_NUM_THREADS=1 $(BIN)/python tools/analysis_tools/measure_cost.py configs/sweeps/digits.yml --sweeps

.PHONY: help setup check-gpu demo demo-classification results results-classification results-ablation results-condensation results-detectors results-rates results-gate results-placement results-padding splits test test-all docs dist lint lock clean

help:
	@echo 'make demo   train a small Mask R-CNN with UBN on real digits and evaluate it (results in work_dirs/demo)'
	@echo 'make demo-classification   train a small ResNet with BN and with UBN on real digits and compare them'
	@echo 'make results-NAME   the runs of docs/results.md; NAME is classification, ablation, condensation, detectors, rates, gate or placement; results-padding those of docs/padding.md'
	@echo 'make results   write docs/results.md from the runs that are done'
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
	$(BIN)/python tools/analysis_tools/plot_condensation.py work_dirs/digits/condensation/*/seed0/ \
	    --out work_dirs/digits/condensation/seed0.png

# The backbones of detectors-start are those of the condensation.
results-detectors: results-condensation
	$(BIN)/python tools/dataset_converters/digits_to_coco.py data/digits
	$(RESULTS) detectors detectors-no-gate detectors-start detectors-placement
	$(COST) detectors detectors-placement

results-rates: splits
	$(RESULTS) learning-rate mnist

results-gate: splits
	$(RESULTS) gate

results-placement: splits
	$(RESULTS) placement fresh-kernel
	$(COST) placement

splits: setup
	for seed in 0 1 2 3 4; do \
	    $(BIN)/python tools/dataset_converters/digits_to_imagefolder.py data/digits-36-split$$seed --size 36 \
	        --seed $$seed --val-share 0.2 --test-share 0.25 || exit 1; \
	    $(BIN)/python tools/dataset_converters/digits_to_imagefolder.py data/mnist-36-split$$seed --source mnist --size 36 \
	        --seed $$seed --val-share 0.1 --test-share 0.3 --train-per-class 100 --test-per-class 100 || exit 1; \
	done

results: setup
	$(BIN)/python tools/misc/write_results.py --from work_dirs/digits

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
	rm -rf $(VENV) work_dirs/demo work_dirs/demo.* work_dirs/demo-classification work_dirs/demo-classification.* data/digits data/digits-36* data/mnist-36*
