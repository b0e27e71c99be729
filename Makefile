# Two commands: `make train` and `make test`. Each makes .venv first if it is missing.
#
#   make train          train the bundled model on this machine, with one GPU, or two processes on a CPU
#   make test           run the tests
#   make check          run the formatter, the linter and the type checker
#   make docs           build the documentation into build/docs
#
# Options:
#   PYTHON=python3.12   the interpreter that makes .venv (3.11 or newer)
#   TORCH_INDEX=URL     install torch and torchvision from this package index. PyTorch's installation page
#                       names an index of CPU builds for Linux and Windows: 200 MB instead of 3 GB
PYTHON ?= python3
# The bundled model is too small to keep two cores busy. Two processes with one thread each are faster.
PROCESSES ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 1 || echo 2)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: train test check docs
train: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) train.py configs/tiny/crd.yaml

test: .venv/ready
	$(BIN)/python -m pytest

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: .venv/docs
	$(BIN)/mkdocs build --strict --site-dir build/docs

.venv/ready: pyproject.toml
	@echo "Step 1 of 3: create the virtual environment .venv"
	$(PYTHON) -m venv .venv
	$(PIP) install --upgrade pip
	@echo "Step 2 of 3: install torch and torchvision from $(or $(TORCH_INDEX),PyPI)" \
		"(the largest download, several minutes on a slow line)"
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch torchvision
	@# The two packages must be built for each other; a pair that is not fails here, and not later.
	$(BIN)/python -c "import torch, torchvision; print('torch', torch.__version__, 'with torchvision', torchvision.__version__)"
	@echo "Step 3 of 3: install flowalign, its other packages and the test tools"
	$(PIP) install --editable '.[dev]'
	touch $@

.venv/docs: .venv/ready
	@echo "Install the documentation tools"
	$(PIP) install --editable '.[docs]'
	touch $@
