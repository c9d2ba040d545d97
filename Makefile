# `make demo` and `make test` set up all they need on first use: a virtual environment, the
# dependencies, the compiled library. `make gpu` uses the packages that are installed already.
PYTHON ?= python3
GPU_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/cpu/* csrc/cuda/*)

.PHONY: demo test lint bench gpu clean

demo: $(VENV)/built
	$(BIN)/restore-nets demo --out out/demo

test: $(VENV)/built lint
	$(BIN)/python -m pytest --require-backends cpu,triton,cuda --numprocesses auto --dist loadfile

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/built
	$(BIN)/restore-kernels profile --all --device cpu --threads 2 --compile --out benchmarks/results

# On a machine with an NVIDIA GPU, PyTorch, Triton and pytest; no network. The suites run side by side,
# then, alone, the benchmarks.
OUT ?= benchmarks/results
GPU_SUITES := topk_attention topk_attention_ops masked_attention masked_attention_masks masked_attention_ops integration \
	pyramid_attention pyramid_attention_hard pyramid_attention_ops pyramid_attention_integration
gpu:
	$(GPU_PYTHON) setup.py -q build_ext --inplace
	mkdir -p $(OUT)/logs
	export PYTHONPATH=.:python; jobs=; status=0; \
	for suite in $(GPU_SUITES); do \
		timeout 300 $(GPU_PYTHON) -m pytest -p no:cacheprovider --device cuda tests/test_$$suite.py \
			> $(OUT)/logs/$$suite.txt 2>&1 & jobs="$$jobs $$!"; \
	done; \
	for job in $$jobs; do wait $$job || status=1; done; \
	tail -n 1 $(OUT)/logs/*.txt; \
	timeout 240 $(GPU_PYTHON) -m restore_kernels profile --all --device cuda --compile --seconds 1 --out $(OUT) \
		&& exit $$status

$(VENV)/installed: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf build out *.egg-info restore_kernels/_c*.so
