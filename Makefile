# `make demo` and `make test` set up all they need on first use: a virtual environment, the
# dependencies, the compiled library. `make gpu` uses the packages that are installed already.
PYTHON ?= python3
GPU_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*/*)

.PHONY: demo test lint bench gpu clean

demo: $(VENV)/built
	$(BIN)/restore-nets demo --out out/demo

test: $(VENV)/built lint
	$(BIN)/python -m pytest --require-backends cpu,triton

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/built
	$(BIN)/python -m restore_kernels.profiling.run --device cpu --compile --out benchmarks/results

# On a machine with an NVIDIA GPU, PyTorch, Triton and pytest; no network.
OUT ?= benchmarks/results
gpu:
	$(GPU_PYTHON) setup.py -q build_ext --inplace
	PYTHONPATH=.:python timeout 270 $(GPU_PYTHON) -m pytest -p no:cacheprovider --device cuda tests/test_topk_attention.py tests/test_integration.py; \
	status=$$?; \
	PYTHONPATH=.:python timeout 240 $(GPU_PYTHON) -m restore_kernels.profiling.run --device cuda --compile --seconds 1 --out $(OUT) && exit $$status

$(VENV)/installed: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf build out *.egg-info restore_kernels/_cpu_*.so
