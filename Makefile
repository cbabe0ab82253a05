# Everything happens in $(VENV); nothing outside this folder is changed.
#
#   make demo TORCH_ARGS="..."               arguments for installing torch, such as where another build is
#   make test PYTEST_ARGS="-k varlen -x"     arguments for pytest
#   make demo DEMO_ARGS="--quick"            arguments for the example

PYTHON      ?= python3
VENV        ?= .venv
TORCH_ARGS  ?=
PYTEST_ARGS ?=
DEMO_ARGS   ?=
BENCH_ARGS  ?=

BIN     := $(VENV)/bin
PY      := $(BIN)/python
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
CXXFILES = $(filter csrc/%,$(SOURCES))
NOTE    := python/fused_attention/_C_missing.txt

# Two test processes of two threads each share two cores: a waiting thread must sleep, not spin.
PYTEST := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(PY) -m pytest -q -n 2 --dist loadgroup

SANITIZERS   := address,undefined
SANITIZE_DIR := build/sanitized
SANITIZE_LIBS = $(foreach lib,libasan.so libubsan.so libstdc++.so.6,$(shell g++ -print-file-name=$(lib)))

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test check format build bench sanitize clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

# The spin count: on a busy machine a waiting thread gives its core back after 0.1 ms, not after some milliseconds.
demo: $(VENV)/.built ## train a digit classifier with torch's attention and with ours, and compare
	GOMP_SPINCOUNT=10000 $(PY) examples/replace_mha.py $(DEMO_ARGS)

test: $(VENV)/.built ## the whole test suite; the Triton kernels in Triton's interpreter
	$(PYTEST) $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(PYTEST) -m triton $(PYTEST_ARGS)

check: $(VENV)/.built ## linters, types, formatting and the fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXXFILES)
	$(PYTEST) -m fast

format: $(VENV)/.tools ## rewrite the sources in the style that `make check` wants
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXXFILES)

build: $(VENV)/.tools ## compile the kernels and install the package in place
	rm -f $(VENV)/.built
	@$(MAKE) --no-print-directory $(VENV)/.built
	$(PY) -m fused_attention info

bench: $(VENV)/.built ## time per call beside torch's, as ratios
	$(PY) -m fused_attention bench $(BENCH_ARGS)

sanitize: $(VENV)/.built ## the fast tests on kernels built with the address and undefined-behavior sanitizers
	rm -rf $(SANITIZE_DIR)
	FUSED_ATTENTION_SANITIZE=$(SANITIZERS) FUSED_ATTENTION_REQUIRE_EXT=1 \
	    $(BIN)/pip install -q --no-build-isolation --no-deps --target $(SANITIZE_DIR) .
	PYTHONPATH=$(SANITIZE_DIR) LD_PRELOAD="$(SANITIZE_LIBS)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	    $(PYTEST) -m fast $(PYTEST_ARGS)

clean: ## remove what was built; $(VENV) stays
	rm -rf build dist python/*.egg-info $(VENV)/.built $(NOTE) python/fused_attention/_C.*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks examples/output
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

$(VENV)/.tools: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH_ARGS) "$$(grep '^torch==' requirements-dev.txt)"
	$(BIN)/pip install -r requirements-dev.txt
	@touch $@

# Without a compiler the package is installed all the same, and tried again the next time.
$(VENV)/.built: $(VENV)/.tools $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation --no-deps --editable .
	@if [ -f $(NOTE) ]; then echo "no compiled kernels, the reference backend serves: $$(cat $(NOTE))"; \
	 else touch $@; fi
