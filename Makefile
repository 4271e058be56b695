# Two commands: `make fit` trains the first model, `make test` runs the tests. Both set up everything they need.
#   make fit TORCH_INDEX=https://download.pytorch.org/whl/cpu     a small CPU build of torch (see README, "Install")
#   make fit ARGS="--encoder.trainer.max_epochs 2"                 any key of any stage

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
ARGS ?=
EXTRAS := dev
TORCH := torch
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q

.PHONY: help install fit test test-slurm test-body test-segmenters check bench clean

help:
	@echo "make fit      set up, film synthetic clips, FastHMR in miniature on them (about 12 minutes on 2 cores)"
	@echo "make test     set up and run the tests (about 11 minutes on 2 cores)"
	@echo "make test-slurm  as root on Debian: install SLURM and shellcheck, run slurm/ on two nodes (about 3 minutes)"
	@echo "make test-body  install Anny (0.5 GB) and check that it still makes the free body, byte by byte"
	@echo "make test-segmenters  install YOLO and RF-DETR beside it (about 3 GB) and make masks with them, of random weights"
	@echo "make check    ruff, mypy and the layering contract"
	@echo "make bench    frames/s of renderer, loader and model on this machine"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@echo "[install] creating $(VENV) with the versions of constraints.txt (1 to 5 minutes, most of it downloads)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fasthmr needs Python 3.11 or newer, got " + sys.version.split()[0] + "; set PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# of such an index torch alone: what it needs besides is pinned to PyPI's versions
	@$(if $(TORCH_INDEX),$(PIP) --no-deps -c constraints.txt $(TORCH) --index-url $(TORCH_INDEX))
	@$(PIP) -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

fit: $(INSTALLED)
	@echo "[fit] first use films synthetic clips, then trains and compares: about 12 minutes on 2 cores"
	$(BIN)/python -m fasthmr.fit -c conf/fasthmr.yaml $(ARGS)

test: $(INSTALLED)
	@echo "[test] running the tests (about 11 minutes on 2 cores)"
	$(BIN)/python -m pytest -n 2 -m "not slurm" $(ARGS)

# The daemons are started by the tests, with a configuration of their own, and not by the packages.
test-slurm: $(INSTALLED)
	@echo "[test-slurm] a SLURM of two nodes on this machine; without root, or where it cannot be installed, tests are skipped"
	@if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && ! { command -v slurmctld && command -v shellcheck; } > /dev/null; then \
		export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1; \
		timeout 120 apt-get update -qq && timeout 300 apt-get install -y -qq --no-install-recommends \
			slurmctld slurmd slurm-client munge shellcheck > /dev/null || echo "[test-slurm] it cannot be installed here"; fi
	timeout --signal=INT --kill-after=60 600 $(BIN)/python -m pytest -m slurm -rs --durations=0 tests/test_slurm.py $(ARGS)

test-body: $(INSTALLED)
	@echo "[test-body] installing Anny, then making the free body anew (about 3 minutes)"
	@$(PIP) -c constraints.txt -e ".[body-generator]"
	$(BIN)/python -m pytest tests/test_body_generate.py

# Not of CI, for its size. In an environment of its own: ultralytics brings an OpenCV that needs libGL, so ours goes on top.
test-segmenters:
	@echo "[test-segmenters] installing YOLO and RF-DETR (about 3 GB to download, 7 GB on disk), then masks by both (2 to 3 minutes)"
	@$(MAKE) install VENV=$(VENV)/segmenters EXTRAS=dev,yolo,rfdetr TORCH="torch torchvision"
	@$(VENV)/segmenters/bin/python -m pip install -q --force-reinstall --no-deps -c constraints.txt opencv-python-headless
	$(VENV)/segmenters/bin/python -m pytest -rs tests/test_segmenters.py $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/python -m fasthmr.benchmark $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
