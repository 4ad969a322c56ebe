# make demo | test | test-all | lint | format | wheel | bench | bench-rivals | check-gpu | bench-gpu | clean
# Everything runs in .venv, made on first use. PYTHON picks the interpreter it is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPU_VENV := .venv-cpu
CPU_BIN := $(CPU_VENV)/bin
# Any supported torch: ">=2.11,<2.16".
VENV_TORCH ?= torch>=2.11,<2.16
# The release of the check without timm and CUDA libraries; where the package index serves a CUDA build
# under this name, the check still runs without timm.
CPU_TORCH ?= torch==2.13.0
# The minor versions of torch that `make wheel` builds for.
TORCH ?= 2.13 2.14
NATIVE := setup.py pyproject.toml $(wildcard csrc/*.* csrc/cpu/*.*)
# Pinned: another release may format differently.
LINTERS := clang-format==23.1.5 mypy==2.4.1 pre-commit==4.7.0 ruff==0.17.6
FORMATTED_CXX := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h tests/cpp/*.cpp)
INSTALL := pip install --quiet --disable-pip-version-check
# C++ tests link the library that was built for Python.
CXX_TESTS_OF = -DGRADNORM_KERNELS_LIBRARY="$$(ls $(CURDIR)/gradnorm_kernels/_C_torch*.so)"
# Of a test that hangs, stderr says what each thread was doing; half a minute later it fails.
PYTEST_OPTIONS := --numprocesses auto --timeout 600 --timeout-method thread -o faulthandler_timeout=570 \
	--durations 20
# What the check of torch 2.13 leaves to the other tests.
OTHERS := inductor or float16 or instruction_set or any_strides or trace or opcheck or opinfo or fuzzed or step_gives \
	or step_has

.PHONY: demo test test-all test-python test-cpp test-cpu-only lint format wheel bench bench-traffic bench-rivals check-gpu bench-gpu clean

demo: $(BIN)/.built
	$(BIN)/gradnorm demo --output demo

test: test-cpp test-cpu-only test-python

# One test at a time: some take most of the memory.
test-all: PYTEST_OPTIONS := --run-slow --durations 20
test-all: OTHERS := inductor
# A library of CMake's, not optimised to compile sooner; shows that every C++ file compiles by itself.
test-all: CXX_TESTS_OF := -DGRADNORM_KERNELS_LIBRARY= -DCMAKE_CXX_FLAGS_RELEASE=-O0
test-all: test

test-python: $(BIN)/.built
	$(BIN)/python -m pytest $(PYTEST_OPTIONS)

test-cpp: $(BIN)/.built
	$(BIN)/cmake -S . -B build/cmake -G Ninja -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
		-DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" $(CXX_TESTS_OF)
	$(BIN)/cmake --build build/cmake
	$(BIN)/ctest --test-dir build/cmake --output-on-failure

# `pytest`, not `python -m pytest`: the latter would import the source tree, built for another torch.
test-cpu-only: $(CPU_BIN)/.built
	$(CPU_BIN)/pytest $(PYTEST_OPTIONS) --few-rows --ignore tests/kernels -k "not ($(OTHERS))"

lint: $(BIN)/.built $(BIN)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED_CXX)
	$(BIN)/mypy

format: $(BIN)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED_CXX)

# A wheel for each torch, which differ in their library only, merged into one.
wheel: $(TORCH:%=.venv-wheel-%/bin/.installed)
	rm -rf build/wheel build/lib* dist/*.whl
	mkdir -p dist
	set -e; for minor in $(TORCH); do \
		bin=.venv-wheel-$$minor/bin; \
		$$bin/pip wheel --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir build/wheel/$$minor .; \
		$$bin/wheel unpack --dest build/wheel/all build/wheel/$$minor/*.whl; \
		ls build/wheel/all/*/gradnorm_kernels/_C_torch$$(echo $$minor | tr . _).*; \
	done; \
	$$bin/wheel pack --dest dist build/wheel/all/*

# What check-gpu and bench-gpu run on; cpu shows that they do, and times nothing.
GPU ?= cuda
RESULTS := benchmarks/results
RIVALS := stock fuse switch compiled compiled_func fuse_compiled fuse_compiled_regions \
	forward_over_reverse finite_difference finite_difference_compiled
LARGE := --batch 64 --model swin_base_patch4_window7_224 resnet50 vit_base_patch16_224 convnext_base
STEPS := -m benchmarks.steps --device
SIZES = $(if $(filter cuda,$(DEVICE)),$(LARGE) --dtype bfloat16 tf32 float32)
# ConvNeXt's graph is too large for a compiler: a loop over the groups of every depthwise convolution.
TRAFFIC = $(BIN)/python -m benchmarks.traffic --variants natural stock fuse checkpoint compiled --batch 64 \
	--json $(RESULTS)/traffic-$(1).json --memory-json $(RESULTS)/memory-$(1).json --model
DEVICE = $(shell $(BIN)/python -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')")

# On a CPU, a quarter of an hour.
bench: $(BIN)/.built
	$(BIN)/python -m benchmarks.kernels --op all --json $(RESULTS)/kernels-$(DEVICE).json
	$(BIN)/python $(STEPS) $(DEVICE) $(SIZES) --variants stock fuse checkpoint switch natural pgd3 --profile \
		--json $(RESULTS)/steps-$(DEVICE).json
	$(BIN)/python -m benchmarks.penalties --json $(RESULTS)/penalties-$(DEVICE).json
	$(BIN)/python -m benchmarks.report

# Needs no GPU, whatever it counts for. The compiler takes minutes a model.
bench-traffic: $(BIN)/.built
	$(call TRAFFIC,swin_base) swin_base_patch4_window7_224
	$(call TRAFFIC,vit_base) vit_base_patch16_224
	$(call TRAFFIC,resnet50-train) resnet50 --act gelu
	$(call TRAFFIC,resnet50-eval) resnet50 --act gelu --bn eval
	$(call TRAFFIC,convnext_base) convnext_base --variants natural stock fuse checkpoint
	$(BIN)/python -m benchmarks.report

# Compilers take minutes a model and variant.
bench-rivals: $(BIN)/.built
	$(BIN)/python $(STEPS) $(DEVICE) $(SIZES) --variants $(RIVALS) --rounds 3 --first-step-limit 900 \
		--json $(RESULTS)/rivals-$(DEVICE).json
	$(BIN)/python -m benchmarks.report

# On a GPU: at most four minutes, and at most eight. WHEEL=FILE takes the library out of a wheel and PYTHON's own torch
# and timm, and neither builds nor installs anything.
ifdef WHEEL
GPU_PYTHON := $(PYTHON)
GPU_READY := build/.carried
else
GPU_PYTHON := $(BIN)/python
GPU_READY := $(BIN)/.built
endif

check-gpu: $(GPU_READY)
	$(GPU_PYTHON) -m benchmarks.gpu check --device $(GPU)

bench-gpu: $(GPU_READY)
	$(GPU_PYTHON) -m benchmarks.gpu bench --device $(GPU)
	$(GPU_PYTHON) -m benchmarks.report --summary

build/.carried: $(WHEEL)
	$(PYTHON) -m zipfile -e $(WHEEL) build/carried
	cp build/carried/gradnorm_kernels/_C_torch* gradnorm_kernels/
	touch $@

clean:
	rm -rf build demo dist *.egg-info gradnorm_kernels/*.so $(VENV) $(CPU_VENV) .venv-wheel-*

$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) "$(VENV_TORCH)" "setuptools>=77" ninja
	touch $@

.venv-wheel-%/bin/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-wheel-$*
	$(@D)/$(INSTALL) "torch==$*.*" "setuptools>=77" ninja wheel
	touch $@

# Also installs what the extras name; torch is kept as it is.
$(BIN)/.built: $(BIN)/.installed $(NATIVE)
	$(BIN)/$(INSTALL) --no-build-isolation --editable ".[train,test]"
	touch $@

$(BIN)/.lint: $(BIN)/.installed
	$(BIN)/$(INSTALL) $(LINTERS)
	touch $@

# A package built for another torch must not share the source tree's library: this one is not editable. It is
# not optimised, to compile sooner; what optimised code computes the other tests check.
$(CPU_BIN)/.built: $(NATIVE) $(wildcard gradnorm_kernels/*.py gradnorm_kernels/kernels/*.py)
	$(PYTHON) -m venv $(CPU_VENV)
	$(CPU_BIN)/$(INSTALL) "$(CPU_TORCH)" "setuptools>=77" ninja expecttest hypothesis numpy pytest pytest-timeout \
		pytest-xdist
	CXXFLAGS=-O0 $(CPU_BIN)/$(INSTALL) --no-build-isolation --no-deps --force-reinstall .
	touch $@
