# `make demo` and `make test` do everything themselves: environment, pinned packages, build, run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# A worker for each core; tests/support/workers.py says which tests go to one of them together.
PARALLEL = -n $(shell nproc) --dist loadscope
CLANG_SOURCES = $(shell git ls-files -co --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh')

.PHONY: help demo test test-all bench check format sanitize race triton-versions llama-cpp \
	real-run build clean

help:
	@echo "make demo      pretrain with RoPE, drop it, recalibrate, evaluate at 1x to 16x (report/)"
	@echo "make test      the test suite"
	@echo "make test-all  the test suite with its slow part"
	@echo "make bench     CPU benchmarks against torch and ONNX Runtime (bench-report/)"
	@echo "make check     formatter, linter, types, budgets"
	@echo "make format    formats every file"
	@echo "make sanitize  kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make race      emulated CUDA kernels under many random schedules, races reported"
	@echo "make triton-versions  the tests of the Triton kernels with later versions of Triton"
	@echo "make llama-cpp compiles llama.cpp and runs our exports through it"
	@echo "make real-run  SmolLM2-135M recalibrated and measured, as in docs/results.md"

demo: build
	$(BIN)/drope demo

test: build
	$(BIN)/pytest tests -q $(PARALLEL) -m "not slow"

test-all: build
	$(BIN)/pytest tests -q $(PARALLEL)

bench: build
	$(BIN)/pytest bench

# ---- environment -------------------------------------------------------------------------------
$(VENV)/stamp-torch: constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c "import sys; assert sys.version_info >= (3, 11), 'needs Python 3.11'"
	@echo "installing torch and the build tools into $(VENV)"
	@$(BIN)/pip install -q -c constraints.txt 'torch==2.13.0' numpy setuptools pybind11 ninja cmake
	@touch $@

# Without build isolation: the pinned tools of the environment build, and rebuild, one directory.
$(VENV)/stamp-install: $(VENV)/stamp-torch pyproject.toml
	@echo "installing drope_kernels and its development packages into $(VENV)"
	@$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[dev,train,eval,bench]'
	@touch $@

build: $(VENV)/stamp-install
	@mkdir -p build
	@echo "building the extension (log: build/log.txt)"
	@$(BIN)/python setup.py -q build_ext --inplace > build/log.txt 2>&1 || (cat build/log.txt; false)

# ---- hygiene -----------------------------------------------------------------------------------
# Every tool speaks, whichever fails.
check: $(VENV)/stamp-install
	@status=0; \
	$(BIN)/ruff check -q --output-format concise || status=1; \
	$(BIN)/ruff format -q --check || status=1; \
	$(BIN)/clang-format --dry-run -Werror $(CLANG_SOURCES) || status=1; \
	$(BIN)/python tools/check_budgets.py || status=1; \
	$(BIN)/mypy || status=1; \
	said=$$($(BIN)/lint-imports --no-cache --no-logo) || { echo "$$said"; status=1; }; \
	exit $$status

format: $(VENV)/stamp-install
	$(BIN)/ruff check -q --fix-only
	$(BIN)/ruff format -q
	$(BIN)/clang-format -i $(CLANG_SOURCES)

sanitize: $(VENV)/stamp-install
	tools/sanitize.sh $(BIN)/python

race: $(VENV)/stamp-install
	$(BIN)/pytest tests/emulation tests/backends/cuda -q $(PARALLEL) -k "schedules"

triton-versions: build
	tools/triton_versions.sh $(BIN)/python

llama-cpp: build
	tools/llama_cpp.sh $(BIN)/python

real-run: build
	tools/real_run.sh $(BIN)/python

clean:
	rm -rf build dist *.egg-info drope_kernels/_C*.so $(VENV)/stamp-install
