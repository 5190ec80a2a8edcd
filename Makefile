# make demo: merge networks on real data and show the result.    make test: check everything.
# Both make a virtual environment in $(VENV) and install what they need into it.
PYTHON ?= python3
VENV ?= .venv
# A release rather than a range: the demo and the tests then run on what they were measured with.
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc python -type f -not -name '*.so' -not -path '*/__pycache__/*')
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.hpp' -o -name '*.cu')
SANITIZED := build/sanitized
# One process per core; eight bound what a large machine spends on importing torch.
PARALLEL := --numprocesses=auto --maxprocesses=8 --dist=worksteal
# The tests run the CUDA kernels in the simulator, which needs no CUDA compiler; `compiled` is for those who have one.
SIMULATED := --config-settings=cmake.define.MUDSC_CUDA=OFF --config-settings=cmake.define.MUDSC_CUDA_SIMULATOR=ON

# The demo builds CUDA kernels only where there is a GPU to use them: compiling them for all GPUs takes minutes.
DEMO_CUDA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo AUTO || echo OFF)

.PHONY: demo test lint unit sanitized compiled clean

demo: $(VENV)/demo.stamp
	$(BIN)/python examples/demo.py

test: lint unit sanitized compiled

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

# The tests of the kernels run once per instruction level of this processor by themselves (fixture `isa`).
unit: $(VENV)/test.stamp
	$(BIN)/python -m pytest $(PARALLEL) --ignore=tests/test_cuda_compiled.py

# The kernels' tests again, on an extension in which every memory access and every arithmetic step is checked.
# Leaks are not looked for: Python and torch keep memory until the process ends.
sanitized: $(SANITIZED)/stamp
	PYTHONPATH=$(SANITIZED)/site \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 MUDSC_TEST_EXAMPLES=25 \
	$(BIN)/python -m pytest $(PARALLEL) tests/kernels

# The CUDA kernels, compiled for every architecture where there is a CUDA compiler. What did not change is not compiled anew.
compiled: $(VENV)/test.stamp
	$(BIN)/python -m pytest tests/test_cuda_compiled.py

$(VENV)/demo.stamp: $(SOURCES) | $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	MUDSC_CUDA=$(DEMO_CUDA) $(BIN)/python -m pip install --quiet ".[demo]"
	touch $@

$(VENV)/test.stamp: $(SOURCES) | $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet ".[test]" $(SIMULATED) \
		--config-settings=cmake.define.MUDSC_WARNINGS_AS_ERRORS=ON
	touch $@

$(VENV):
	$(PYTHON) -m venv $(VENV)

$(SANITIZED)/stamp: $(SOURCES) $(VENV)/test.stamp
	rm -rf $(SANITIZED)/site
	$(BIN)/python -m pip install --quiet --no-deps --target $(SANITIZED)/site . $(SIMULATED) \
		--config-settings=build-dir=$(SANITIZED)/build --config-settings=cmake.define.MUDSC_SANITIZE=ON
	touch $@

clean:
	rm -rf build $(VENV) demo_output
