# make test       everything that a change must pass: lint, build, tests, Triton's interpreter, emulator, a pretended
#                 GPU, sanitizers
# make interpreted, emulated, pretended, forced   the last four parts alone
# make slow       also the tests that take minutes
# make clients    the tests with other libraries' trainers and solvers, which `make test` runs, too
# make matrix     the tests of the ops and the layers on several versions of torch, each in its own environment
# make held       the op family's tests, with torch and oneDNN limited to older instruction sets
# make sanitize   an hour of random calls under sanitizers
# make lint       style and types; make format repairs the style
# make compare    the comparison of methods; make bench measures speed, make report only writes its tables and figures
# make aot        compile all Triton and CUDA kernels, and show what the compilers made of them
# make docs       the pages of docs/ as HTML, in build/docs
# make gpu        all that a GPU is asked, in nine minutes, with the Python of the GPU's machine; other targets use .venv
# make gpu-rerun  a few of its stages, in three minutes; make gpu-carry compiles here what that machine would have to
# make clean      delete .venv and everything that was built
PYTHON ?= python3
BIN := .venv/bin
BUILT := .venv/built
SANITIZED := .venv/sanitized
CPU_SOURCES := $(wildcard csrc/*.cpp csrc/eager/* csrc/cpu/*)
SOURCES := $(CPU_SOURCES) $(wildcard csrc/cuda/*)

.PHONY: test interpreted emulated pretended slow clients held matrix forced sanitize lint format clean
.PHONY: compare compare-ready bench report docs aot gpu gpu-rerun gpu-carry

# One process for each core, with one thread each: the tests are many and small.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

test: lint $(BUILT) $(SANITIZED)
	$(PYTEST)
	$(MAKE) interpreted emulated pretended forced

# The Triton kernels in Triton's interpreter. Triton reads this variable when it is imported.
interpreted: .venv/ready $(BUILT)
	TRITON_INTERPRET=1 $(PYTEST) -k triton tests/ops tests/backends/test_kernels.py tests/backends/test_triton.py \
		tests/backends/test_triton_terms.py tests/backends/test_triton_points.py tests/backends/test_triton_traced.py

# The CUDA kernels in the emulator of csrc/cuda/emulated.h.
emulated: .venv/ready $(BUILT)
	FASTHYPER_EMULATED=1 $(PYTEST) -k cuda tests/ops tests/test_contract.py tests/backends/test_kernels.py \
		tests/backends/test_cuda.py

# What decides by the device of a tensor, on a GPU that tests/pretend pretends: its memory is the host's.
PRETENDED := FASTHYPER_EMULATED=1 FASTHYPER_TEST_DEVICE=cuda PYTHONPATH=.:tests/pretend:tests/experiments
pretended: .venv/ready $(BUILT)
	$(PRETENDED) $(PYTEST) -p pretended_gpu tests/pretend tests/backends/test_cuda.py
	$(PRETENDED) $(PYTEST) -p pretended_gpu -k cuda tests/ops/test_values.py tests/backends/test_kernels.py

slow: .venv/ready $(BUILT)
	$(PYTEST) --slow

# Lightning, accelerate, transformers' Trainer and torchdiffeq: the extra `clients`, a part of `dev`.
clients: .venv/ready $(BUILT)
	$(PYTEST) tests/clients

FAMILY := tests/ops tests/backends tests/test_functional.py tests/test_contract.py tests/test_memory.py
held: .venv/ready $(BUILT)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) $(FAMILY)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(PYTEST) $(FAMILY)

# Each version of torch has an environment and compiled kernels of its own in .venv-matrix; `newest` is what pip finds.
MATRIX ?= 2.11.0 2.13.0 newest
MATRIX_TESTS := $(filter-out tests/backends,$(FAMILY)) tests/nn
matrix:
	@for version in $(MATRIX); do \
		folder=$(CURDIR)/.venv-matrix/$$version; \
		case $$version in newest) wanted="--upgrade torch";; *) wanted="torch==$$version";; esac; \
		if ! { $(PYTHON) -m venv $$folder && $$folder/bin/python -m pip install --quiet --no-compile $$wanted numpy \
			hypothesis pytest pytest-xdist; }; then results="$$results; torch $$version: cannot be installed"; continue; fi; \
		version=$$($$folder/bin/python -c "import torch; print(torch.__version__)"); \
		if FASTHYPER_CACHE=$$folder/cache $$folder/bin/python -m fasthyper build && FASTHYPER_CACHE=$$folder/cache \
			OMP_NUM_THREADS=1 $$folder/bin/python -m pytest -q --numprocesses auto --maxprocesses 8 $(MATRIX_TESTS); \
			then results="$$results; torch $$version: passed"; else results="$$results; torch $$version: FAILED"; failed=1; fi; \
	done; echo "$${results#; }"; test -z "$$failed"

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, with vectors of 4, 8 and 16 floats and with
# plain loops instead of oneDNN's products, so that every processor runs all of them, bfloat16 too. `make test` fuzzes
# each width (tests/kernels/test_fuzz.py) and runs the tests of the op family at one width.
PRELOAD = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)
WITH_SANITIZERS = LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 \
	FASTHYPER_COMPILED=build/sanitized/fasthyper/_compiled
VALUES := tests/ops/test_values.py tests/test_functional.py tests/backends/test_cpu.py
forced: .venv/ready $(SANITIZED)
	$(WITH_SANITIZERS) FASTHYPER_CPU=width16 FASTHYPER_BFLOAT16=1 $(PYTEST) -k cpu $(VALUES)

# The same at every width, with and without products of bfloat16, then random calls for an hour on two cores.
CASES ?= 50000
sanitize: .venv/ready $(SANITIZED)
	for width in width4 width8 width16; do for native in 0 1; do \
		$(WITH_SANITIZERS) FASTHYPER_CPU=$$width FASTHYPER_BFLOAT16=$$native $(PYTEST) -k cpu $(VALUES) || exit 1; done; done
	FASTHYPER_FUZZ_CASES=$(CASES) $(PYTEST) tests/kernels/test_fuzz.py

$(SANITIZED): setup.py fasthyper/building.py $(CPU_SOURCES) .venv/torch
	FASTHYPER_SANITIZE=address,undefined FASTHYPER_ONLY="cpu_width4 cpu_width8 cpu_width16" $(BIN)/python setup.py \
		--quiet build_ext --build-lib build/sanitized --build-temp build/sanitized-objects
	touch $@

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/mypy

# NAME=rotation runs one experiment. pip installs on one core while the other compiles.
NAME ?= all
compare: compare-ready
	$(BIN)/fasthyper compare $(NAME)

compare-ready: .venv/torch
	$(MAKE) --no-print-directory --jobs=2 .venv/compare .venv/here

# Measure every workload in every library, the cost along sizes, and training; then write tables and figures, those of
# the README too. Then measure Python's share of a call on a GPU, without one. ARGUMENTS are those of `python -m benchmarks measure --help`, such as "--only qm9".
bench: .venv/ready $(BUILT)
	$(BIN)/python -m benchmarks measure $(ARGUMENTS)
	$(BIN)/python -m benchmarks overhead

report: .venv/ready
	$(BIN)/python -m benchmarks report

# The pages of docs/ as HTML, in build/docs; a warning is an error.
docs: .venv/docs
	$(BIN)/python -m sphinx --quiet -W --keep-going --builder html docs build/docs

# The resource usage of every CUDA kernel, and of every Triton kernel and tile, compiled for every arch, then the hot loops
# of published shapes; ARCHS="sm_90" and CUDA_ARCHS="sm_90a" for one.
aot: .venv/ready
	-$(BIN)/python tests/kernels/resource_usage.py $(CUDA_ARCHS)
	$(BIN)/python tests/kernels/aot.py $(ARCHS)
	PYTHONPATH=. $(BIN)/python tests/kernels/hot_loops.py

# docs/kernels.md has the stages, `python tests/gpu/stages.py list` their names. STAGES="smoke-cuda fresh" chooses for a
# rerun. OUT is the folder of the results: `python tests/gpu/stages.py record FOLDER` enters them in fasthyper/seen.json.
GPU_PYTHON ?= python3
OUT ?= build/gpu-results
STAGES ?= smoke-cuda smoke-triton fresh tests-cuda tests-triton
gpu:
	$(GPU_PYTHON) tests/gpu/stages.py run --out $(OUT)
gpu-rerun:
	$(GPU_PYTHON) tests/gpu/stages.py run --out $(OUT) $(STAGES)

# build/carried, for the GPU's machine: libraries for its torch, and Triton's cache for the Triton of that torch and for
# its Python. The torch is in the same environment as for `make matrix`. docs/kernels.md says what must agree.
CARRY_TORCH ?= 2.11.0
CARRY_PYTHON ?= 3.12
CARRY_ARCHS ?= 9.0a
CARRYING := build/carrying
gpu-carry: .venv/ready
	@folder=$(CURDIR)/.venv-matrix/$(CARRY_TORCH) && mkdir -p $(CARRYING)/here && \
	{ test -x $$folder/bin/python || $(PYTHON) -m venv $$folder; } && \
	$$folder/bin/python -m pip install --quiet --no-compile torch==$(CARRY_TORCH) numpy && \
	TORCH_CUDA_ARCH_LIST="$(CARRY_ARCHS)" $$folder/bin/python tests/gpu/carry_libraries.py && \
	triton=$$(ls -d $$folder/lib/python*/site-packages/triton) && ln -sfn $$triton $(CARRYING)/here/triton && \
	version=$$($$folder/bin/python -c "import triton; print(triton.__version__)") && \
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version $(CARRY_PYTHON) \
		--dest $(CARRYING)/wheels triton==$$version && \
	$(BIN)/python tests/gpu/carry_triton.py $(CARRYING)/here $$(ls $(CARRYING)/wheels/triton-$$version-*)

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

clean:
	rm -rf .venv .venv-matrix build dist *.egg-info fasthyper/_compiled/*.so fasthyper/_compiled/build.json .pytest_cache .ruff_cache .mypy_cache .hypothesis

# Incremental builds. .venv/here: the kernels that this machine's CPU loads, for `make compare`. .venv/built: all kernels
# and the emulated CUDA library, for the tests; nvcc compiles for one architecture, since the tests compile for others.
# A build deletes the libraries that it leaves out, so that no outdated one is loaded: .venv/here makes .venv/built
# outdated, and .venv/built includes .venv/here.
ARCH_LIST ?= 9.0a
.venv/here: setup.py fasthyper/building.py $(CPU_SOURCES) .venv/torch
	rm -f $(BUILT)
	FASTHYPER_ONLY=here $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

$(BUILT): setup.py fasthyper/building.py $(SOURCES) .venv/torch
	FASTHYPER_BUILD_EMULATOR=1 TORCH_CUDA_ARCH_LIST="$(ARCH_LIST)" $(BIN)/python setup.py --quiet build_ext \
		--inplace
	touch .venv/here $@

# .venv in three steps: the packages for a build (torch warns without numpy), those for `make compare`, all others.
# Compiling bytecode is half of pip's time: only the tests need it, because they start many processes.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
EDITABLE := FASTHYPER_BUILD=later $(INSTALL) --no-build-isolation --editable
.venv/torch: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("fasthyper needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(INSTALL) torch numpy setuptools
	touch $@

.venv/compare: .venv/torch
	$(EDITABLE) '.[compare]'
	touch $@

.venv/docs: .venv/compare
	$(EDITABLE) '.[docs]'
	touch $@

.venv/ready: .venv/compare
	$(EDITABLE) '.[dev]'
	$(INSTALL) --no-deps hyper-nn timm torchvision
	$(BIN)/python -W ignore -m compileall -qq -j 0 .venv/lib || true  # some files are for other versions of Python
	touch $@
