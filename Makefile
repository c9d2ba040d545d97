# `make demo` and `make test` set up all they need on first use: a virtual environment, the
# dependencies, the compiled library. `make gpu` uses the packages that are installed already.
PYTHON ?= python3
GPU_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/cpu/* csrc/cuda/*)

.PHONY: demo test test-compilers lint bench results gpu gpu-test gpu-sanitize gpu-bench gpu-steps clean

demo: $(VENV)/built
	$(BIN)/restore-nets demo --out out/demo

PYTEST := $(BIN)/python -m pytest --require-backends cpu,triton,cuda --numprocesses auto --dist loadfile --no-loadscope-reorder
FOR_COMPILERS := $(patsubst %,tests/test_%.py,compiling triton_compiled cuda_device cuda_sanitizer)

test: lint $(VENV)/built-tests
	$(PYTEST) $(FOR_COMPILERS:%=--ignore=%)

# What takes compilers minutes: whole networks and their gradients under torch.compile, kernels for GPUs that are not
# here, and CUDA kernels on the host under AddressSanitizer.
test-compilers: $(VENV)/built-compilers
	$(PYTEST) $(FOR_COMPILERS)

lint: $(VENV)/installed-all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# make bench BENCH="-k topk --benchmark-compare", and every other option of pytest-benchmark; runs are kept in .benchmarks.
bench: $(VENV)/built $(VENV)/installed-all
	$(BIN)/python -m pytest benchmarks --benchmark-autosave $(BENCH)

results: $(VENV)/built
	$(BIN)/restore-kernels profile --all --device cpu --threads 2 --compile --out benchmarks/results

# On a machine with an NVIDIA GPU, PyTorch, Triton and pytest; no network. Nine minutes at the most, or by part:
# make gpu PART=test|sanitize|bench. COMPILE=--compile times torch.compile of the baselines too: fewer cases are
# measured in that time. PART=steps, training steps of NETWORKS (all, if none is named), takes minutes for
# each and writes what it has after each. What follows a part that failed runs all the same: no wrong result gets a speed.
OUT ?= benchmarks/results
PART ?= test sanitize bench
# An interrupt: tests that fail until then are told, and what is measured is kept.
TIMEOUT := timeout --signal=INT --kill-after=15
GPU_TEST := $(GPU_PYTHON) -m pytest -p no:cacheprovider --device cuda
GPU_SUITES := topk_attention topk_attention_ops masked_attention masked_attention_masks masked_attention_ops \
	integration convolution_integration pyramid_attention pyramid_attention_hard pyramid_attention_ops pyramid_attention_integration \
	channel_norm channel_norm_ops channel_gate channel_gate_ops bilinear_resize bilinear_resize_ops depthwise_conv depthwise_conv_integration \
	pointwise_conv pointwise_conv_integration cuda_channel cuda_token cuda_pyramid cuda_graphs step_profile_gpu
SANITIZED := keys_masked or equal_scores or out_proj49 or ways_through

gpu:
	mkdir -p $(OUT)
	RESTORE_KERNELS_BUILD=native $(GPU_PYTHON) setup.py -q build_ext --inplace
	status=0; for part in $(PART); do $(MAKE) gpu-$$part || status=1; done; exit $$status

gpu-%: export PYTHONPATH = .:python

# Thousands of kernels to compile, a good part of an hour of one core: where the time is up, something of every suite has
# run (tests/conftest.py).
gpu-test:
	$(TIMEOUT) 220 $(GPU_TEST) --require-backends triton,cuda --numprocesses auto --dist worksteal \
		$(GPU_SUITES:%=tests/test_%.py) > $(OUT)/gpu-test.txt 2>&1; status=$$?; tail -n 40 $(OUT)/gpu-test.txt; exit $$status

gpu-sanitize:
	$(TIMEOUT) 50 compute-sanitizer --error-exitcode 1 $(GPU_TEST) -k "$(SANITIZED)" \
		tests/test_cuda_channel.py tests/test_cuda_token.py tests/test_cuda_pyramid.py > $(OUT)/gpu-sanitize.txt 2>&1; status=$$?; tail -n 20 $(OUT)/gpu-sanitize.txt; exit $$status

gpu-bench:
	$(TIMEOUT) 170 $(GPU_PYTHON) -m restore_kernels profile --all --device cuda --seconds 0.5 --limit 130 $(COMPILE) --out $(OUT); status=$$?; \
		$(GPU_PYTHON) benchmarks/choices.py $(OUT) && exit $$status

gpu-steps:
	$(TIMEOUT) 500 $(GPU_PYTHON) benchmarks/steps.py $(NETWORKS) --device cuda --compile; status=$$?; \
		[ $(OUT) = benchmarks/results ] || cp -r benchmarks/results/steps $(OUT); exit $$status

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/installed-all: $(VENV)/installed requirements-dev.txt
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	touch $@

# For this machine: what it has no use for takes longer to build than all else.
$(VENV)/built: $(VENV)/installed $(SOURCES)
	RESTORE_KERNELS_BUILD=native $(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/built-tests: $(VENV)/built $(VENV)/installed-all
	RESTORE_KERNELS_BUILD=tests $(BIN)/python setup.py -q build_ext --inplace
	touch $@

$(VENV)/built-compilers: $(VENV)/built-tests
	TORCH_CUDA_ARCH_LIST=9.0a RESTORE_KERNELS_BUILD=tests $(BIN)/python setup.py -q build_ext --inplace
	touch $@

clean:
	rm -rf build out *.egg-info restore_kernels/_c*.so $(VENV)/built*
