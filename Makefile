# make test | compare | bench | report | aot | gpu | sanitize | held | format | clean. All but gpu run in .venv, made on first use.
PYTHON ?= python3
BIN := .venv/bin
BUILT := .venv/built
SANITIZED := .venv/sanitized
CPU_SOURCES := $(wildcard csrc/*.cpp csrc/cpu/*)
SOURCES := $(CPU_SOURCES) $(wildcard csrc/cuda/*)

.PHONY: test interpreted emulated slow held forced sanitize lint compare compare-ready bench report aot gpu gpu-test bench-gpu format clean

# One process a core, one thread each: the tests are many and small.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

test: lint $(BUILT) $(SANITIZED)
	$(PYTEST)
	$(MAKE) interpreted emulated forced

# The Triton kernels by Triton's interpreter, which has to be asked for before triton is imported.
interpreted: .venv/ready $(BUILT)
	TRITON_INTERPRET=1 $(PYTEST) -k triton tests/ops tests/backends/test_kernels.py tests/backends/test_triton.py

# The CUDA kernels by the emulator of csrc/cuda/emulated.h.
emulated: .venv/ready $(BUILT)
	FASTHYPER_EMULATED=1 $(PYTEST) -k cuda tests/ops tests/test_contract.py tests/backends/test_kernels.py \
		tests/backends/test_cuda.py

slow: .venv/ready $(BUILT)
	$(PYTEST) --slow

# The suite of the op family with torch and oneDNN held to an older instruction set.
FAMILY := tests/ops tests/backends tests/test_functional.py tests/test_contract.py tests/test_memory.py
held: .venv/ready $(BUILT)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) $(FAMILY)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(PYTEST) $(FAMILY)

# The compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer, with vectors of 4, 8 and 16 floats, which any
# processor runs, and with plain products, of 16 bits too, in the place of oneDNN's. tests/kernels/test_fuzz.py has random
# calls of them; here is the suite of the family: what a processor decides is forced, one value after the other.
PRELOAD = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)
UNDER = LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 FASTHYPER_COMPILED=build/sanitized/fasthyper/_compiled
VALUES := tests/ops/test_values.py tests/test_functional.py tests/backends/test_cpu.py
forced: .venv/ready $(SANITIZED)
	$(UNDER) FASTHYPER_CPU=width16 FASTHYPER_BFLOAT16=1 $(PYTEST) -k cpu $(VALUES)

# All of them, and an hour of random calls on two cores.
CASES ?= 50000
sanitize: .venv/ready $(SANITIZED)
	for width in width4 width8 width16; do for native in 0 1; do \
		$(UNDER) FASTHYPER_CPU=$$width FASTHYPER_BFLOAT16=$$native $(PYTEST) -k cpu $(VALUES) || exit 1; done; done
	FASTHYPER_FUZZ_CASES=$(CASES) $(PYTEST) tests/kernels/test_fuzz.py

$(SANITIZED): setup.py $(CPU_SOURCES) .venv/torch
	FASTHYPER_SANITIZE=address,undefined FASTHYPER_ONLY="cpu_width4 cpu_width8 cpu_width16" $(BIN)/python setup.py \
		--quiet build_ext --build-lib build/sanitized --build-temp build/sanitized-objects
	touch $@

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/mypy

# NAME=rotation for one experiment. pip installs on one core while another compiles.
NAME ?= all
compare: compare-ready
	$(BIN)/fasthyper compare $(NAME)

compare-ready: .venv/torch
	$(MAKE) --no-print-directory --jobs=2 .venv/compare .venv/here

# Every workload against everyone, cost along sizes, training; then tables and figures, the README's too. ARGUMENTS of
# `python -m benchmarks measure --help`, such as "--only qm9". `make report` makes them of the results that are there.
bench: .venv/ready $(BUILT)
	$(BIN)/python -m benchmarks measure $(ARGUMENTS)

report: .venv/ready
	$(BIN)/python -m benchmarks report

# The resource usage of every Triton kernel and tile, compiled for every arch; ARCHS="sm_90" for one.
aot: .venv/ready
	$(BIN)/python tests/kernels/aot.py $(ARCHS)

# On a machine with a GPU, with its own Python and what is installed there: build and tests, then workloads, each within
# ten minutes. Tests take the likeliest tile, or each would wait for three to be compiled. GPU_PARTS=8.0 for an A100. Of the
# sanitizer's tools, racecheck and synccheck know no mbarriers: what they say of kernels for sm_90a is to be doubted.
GPU_PYTHON ?= python3
GPU_PARTS ?= 9.0a
OUT ?= benchmarks/results
ON_GPU := FASTHYPER_TEST_DEVICE=cuda FASTHYPER_AUTOTUNE=0 PYTHONPATH=.
GPU_TEST := $(GPU_PYTHON) -m pytest -q --numprocesses auto --maxprocesses 12
GPU_MEASURE := $(GPU_PYTHON) -m benchmarks measure --device cuda --no-report --out $(OUT)
gpu: gpu-test bench-gpu
gpu-test:
	rm -f .venv/here $(BUILT)
	FASTHYPER_ONLY=cuda TORCH_CUDA_ARCH_LIST=$(GPU_PARTS) timeout 240 $(GPU_PYTHON) setup.py --quiet build_ext --inplace \
		|| echo "NOT BUILT"
	$(ON_GPU) timeout -s INT -k 5 60 $(GPU_TEST) tests/backends/test_gpu.py || echo "TESTS FAILED on the GPU"
	$(ON_GPU) timeout -s INT -k 5 60 $(GPU_TEST) tests/kernels/test_hopper.py tests/backends/test_cuda.py \
		|| echo "TESTS FAILED on the GPU"
	$(ON_GPU) timeout -s INT -k 5 60 $(GPU_TEST) -k cuda tests/ops tests/backends/test_kernels.py \
		|| echo "TESTS FAILED on the GPU"
	for tool in memcheck racecheck synccheck; do PYTHONPATH=. timeout -k 5 60 compute-sanitizer --error-exitcode 9 \
		--tool $$tool $(GPU_PYTHON) tests/kernels/sanitized.py || echo "$$tool: $$?, where 9 is a fault and 124 no time"; done
bench-gpu:
	$(ON_GPU) timeout -s INT -k 5 90 $(GPU_TEST) -k triton --durations 5 tests/ops tests/backends/test_kernels.py \
		tests/backends/test_triton.py || echo "TESTS FAILED on the GPU"
	timeout 240 $(GPU_MEASURE) --studies workloads --dtypes bfloat16 --modes "forward + backward" --budget 180 || echo "$$?"
	timeout 130 $(GPU_MEASURE) --studies scaling,training --budget 90 || echo "$$?"
	timeout 100 $(GPU_MEASURE) --studies workloads --modes forward,"training step" --eager --budget 60 || echo "$$?"

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

clean:
	rm -rf .venv build dist *.egg-info fasthyper/_compiled/*.so fasthyper/_compiled/build.json .pytest_cache .ruff_cache .mypy_cache .hypothesis

# The kernels, incremental: those that this machine's CPU takes, for `make compare`, or all of them, with the CUDA kernels
# for a CPU, which the tests run, and for one generation of GPUs: the tests compile the others anyway. A build drops what
# it was not asked for, so that nothing old is loaded; all of them are those of this machine, too.
ARCH_LIST ?= 9.0a
.venv/here: setup.py $(CPU_SOURCES) .venv/torch
	rm -f $(BUILT)
	FASTHYPER_ONLY=here $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

$(BUILT): setup.py $(SOURCES) .venv/torch
	FASTHYPER_BUILD_EMULATOR=1 TORCH_CUDA_ARCH_LIST="$(ARCH_LIST)" $(BIN)/python setup.py --quiet build_ext \
		--inplace
	touch .venv/here $@

# What a build needs, with numpy, which torch looks for; on top what `make compare` needs, and what all else does. Bytecode
# is half of pip's time: Python makes what it needs on first use, and the tests, which start many processes, have it all.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
EDITABLE := FASTHYPER_BUILD=later $(INSTALL) --no-build-isolation --editable
.venv/torch: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("fasthyper needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(INSTALL) torch numpy setuptools ninja
	touch $@

.venv/compare: .venv/torch
	$(EDITABLE) '.[compare]'
	touch $@

.venv/ready: .venv/compare
	$(EDITABLE) '.[dev]'
	$(INSTALL) --no-deps hyper-nn
	$(BIN)/python -W ignore -m compileall -qq -j 0 .venv/lib || true  # packages have files that are not for this Python
	touch $@
