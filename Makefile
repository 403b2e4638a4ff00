# Every target first creates the virtual environment from requirements.lock; `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NPROC ?= 4

.PHONY: help setup train serve test test-all test-lowest lint bench lock images

help:
	@echo "make train      train the MNIST convnet on $(NPROC) processes (NPROC=n for another number) and export it;"
	@echo "                ARGS='--run-dir runs/mine' hands options to the trainer, and continues that run"
	@echo "make serve      serve the models in models/ over gRPC and HTTP, on loopback"
	@echo "make test       run the test suite, on two cores"
	@echo "make test-all   run it, and then the tests that take minutes or install packages (9 GB)"
	@echo "make test-lowest  run the test suite with the lowest versions that pyproject.toml allows (another 7 GB)"
	@echo "make lint       run ruff, mypy --strict and import-linter"
	@echo "make bench      compare training with a plain PyTorch loop, and measure serving (benchmarks/results)"
	@echo "make setup      create .venv from requirements.lock, or update it after the lock changed"
	@echo "make images     build the four container images (deploy/docker/images.sh lists the settings)"
	@echo "make lock       choose new versions for requirements.lock"

setup: $(VENV)/installed

# Compares digests, because a fresh checkout or a switch of branches changes the files' dates.
$(VENV)/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Convoy needs Python 3.11 or later, and $(PYTHON) is " + sys.version.split()[0] + "; try make PYTHON=python3.12 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if ! cat requirements.lock pyproject.toml | sha256sum | cmp -s - $(VENV)/installed; then \
	  echo "installing the locked versions into $(VENV) (7 GB; some minutes)"; \
	  rm -f $(VENV)/installed && \
	  $(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock && \
	  $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable . && \
	  cat requirements.lock pyproject.toml | sha256sum > $(VENV)/installed.new && mv $(VENV)/installed.new $(VENV)/installed; \
	else touch $(VENV)/installed; fi

# OMP_NUM_THREADS only silences torchrun's warning: each rank sets its own number of threads.
train: setup
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node=$(NPROC) trainer/main.py $(ARGS)

serve: setup
	$(BIN)/python -m serving --model-repository models --model-control-mode poll

# Half of the suite waits for servers, signals and hosts, so two processes share it, file by file, long ones first. Idle
# OpenMP threads must not spin.
test: setup
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What installs packages does so one test after another.
test-all: test
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m "minutes and not installs" -n 2 --dist loadfile
	$(BIN)/python -m pytest -m installs

# The lower bounds of pyproject.toml are versions with which the suite passes, all of the lowest together.
test-lowest: setup
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(VENV)-lowest
	$(BIN)/uv pip install --quiet --python $(VENV)-lowest/bin/python --resolution lowest-direct --editable '.[dev]'
	OMP_WAIT_POLICY=passive $(VENV)-lowest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/serving.py --model models/mnist/1/model.onnx $(if $(PEERS),--peers $(PEERS))

lock:
	$(BIN)/uv pip compile --quiet --upgrade --universal --generate-hashes --python-version 3.11 \
	  --extra dev pyproject.toml --output-file requirements.lock

images:
	sh deploy/docker/images.sh
