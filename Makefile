# make demo: merge networks on real data and show the result.    make test: run all checks.
# make docs: build the documentation in site/.    make test-oldest: run the tests with the oldest supported torch.
# Each target creates a virtual environment in $(VENV) and installs its requirements there.
PYTHON ?= python3
VENV ?= .venv
# A fixed release, so that the demo and the tests run with the version they were measured with.
TORCH ?= torch==2.13.0
OLDEST_TORCH ?= torch==2.4.*

BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc python -type f -not -name '*.so' -not -path '*/__pycache__/*')
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.hpp' -o -name '*.cu')
SANITIZED := build/sanitized
# One process per core, but at most eight, because every process imports torch.
PARALLEL := --numprocesses=auto --maxprocesses=8 --dist=worksteal
# The tests run the CUDA kernels in the simulator, which needs no CUDA compiler; `compiled` is for those who have one.
# A unity build compiles the bindings in a quarter of the time.
SIMULATED := --config-settings=cmake.define.MUDSC_CUDA=OFF --config-settings=cmake.define.MUDSC_CUDA_SIMULATOR=ON \
	--config-settings=cmake.define.CMAKE_UNITY_BUILD=ON

# The demo builds CUDA kernels only where there is a GPU to use them: compiling them for all GPUs takes minutes.
DEMO_CUDA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo AUTO || echo OFF)

.PHONY: demo test test-oldest lint unit sanitized compiled docs paper clean

# The sanitizers are preloaded, which needs Linux.
SANITIZED_STAMP := $(if $(filter Linux,$(shell uname -s)),$(SANITIZED)/stamp)

demo: $(VENV)/demo.stamp
	$(BIN)/python examples/demo.py

# What uses one core runs beside something else: the installation beside the builds, then the checks beside each other
# and the sanitized build. The tests use all cores.
test:
	$(MAKE) --jobs=2 lint compiled docs $(SANITIZED_STAMP) DOCS_STAMP=$(VENV)/test.stamp
	$(MAKE) unit
	$(MAKE) sanitized

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/codespell
	$(BIN)/mypy

# Kernel tests run once per instruction level of this processor (fixture `isa`).
unit: $(VENV)/test.stamp
	$(BIN)/python -m pytest $(PARALLEL) --ignore=tests/test_cuda_compiled.py

# The kernel tests again, with an extension that checks every memory access and arithmetic operation, but those that check
# values alone. Leaks are not reported, because Python and torch keep memory until the process ends.
ifneq ($(SANITIZED_STAMP),)
sanitized: $(SANITIZED_STAMP)
	PYTHONPATH=$(SANITIZED)/site \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 MUDSC_TEST_EXAMPLES=5 \
	$(BIN)/python -m pytest $(PARALLEL) -m "not values" tests/kernels
else
sanitized:
	@echo "skipped: the sanitized tests need Linux"
endif

# The CUDA kernels, compiled for every architecture; skipped without nvcc. Only changed files are recompiled.
compiled: $(VENV)/test.stamp
	$(BIN)/python -m pytest tests/test_cuda_compiled.py

# What two cores can do of the paper's experiments, in about three hours: MNIST with the full recipe, and CIFAR-10 with
# networks of width 1 instead of 8. Set MNIST, CIFAR10 and VECTORS to .npz files. A stopped run continues.
paper: $(VENV)/test.stamp
	cd benchmarks && ../$(BIN)/python -m paper mnist --data "$(MNIST)" --pairs 3 --samples 5000 --search-samples 2000
	cd benchmarks && ../$(BIN)/python -m paper cifar10 --data "$(CIFAR10)" --class-vectors "$(VECTORS)" \
		--width 1 --epochs 20 --batch-size 125 --learning-rate 0.1 --pairs 3 --samples 2000 --search-samples 5000 \
		--landscape-steps 11 --landscape-samples 500 --bfloat16

# The extra `test` includes `docs`.
DOCS_STAMP := $(if $(wildcard $(VENV)/test.stamp),$(VENV)/test.stamp,$(VENV)/docs.stamp)
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The same tests in a second environment, with the oldest torch that pyproject.toml allows.
test-oldest:
	$(MAKE) unit VENV=$(VENV)-oldest TORCH="$(OLDEST_TORCH)"

$(VENV)/demo.stamp: $(SOURCES) $(VENV)/torch.stamp
	MUDSC_CUDA=$(DEMO_CUDA) $(BIN)/python -m pip install --quiet ".[demo]"
	touch $@

# The wheel is installed twice: with what it needs, and again because pip keeps an installed package of the same version.
$(VENV)/test.stamp: $(VENV)/wheel/stamp $(VENV)/torch.stamp
	$(BIN)/python -m pip install --quiet "$(TORCH)" "$$(ls $(VENV)/wheel/*.whl)[test]"
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall $(VENV)/wheel/*.whl
	touch $@

$(VENV)/wheel/stamp: $(SOURCES) | $(VENV)
	rm -rf $(VENV)/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(VENV)/wheel . $(SIMULATED) \
		--config-settings=cmake.define.MUDSC_WARNINGS_AS_ERRORS=ON
	touch $@

$(VENV)/docs.stamp: $(SOURCES) $(VENV)/torch.stamp
	$(BIN)/python -m pip install --quiet ".[docs]"
	touch $@

$(VENV)/torch.stamp: | $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV):
	$(PYTHON) -m venv $(VENV)

$(SANITIZED)/stamp: $(SOURCES) | $(VENV)
	rm -rf $(SANITIZED)/site
	$(BIN)/python -m pip install --quiet --no-deps --target $(SANITIZED)/site . $(SIMULATED) \
		--config-settings=build-dir=$(SANITIZED)/build --config-settings=cmake.define.MUDSC_SANITIZE=ON
	touch $@

clean:
	rm -rf build site demo_output $(VENV) $(VENV)-oldest
