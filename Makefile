# Two commands: `make train` and `make test`. Each makes .venv when it is missing.
PYTHON ?= python3
# A model this small keeps one core busy, not two: two processes of one thread each are the quicker way to use two cores.
PROCESSES ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 1 || echo 2)
BIN := .venv/bin

.PHONY: train test check
train: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) train.py configs/tiny/crd.yaml

test: .venv/ready
	$(BIN)/python -m pytest

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
