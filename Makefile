# make demo    set up, then see the package work      make test    set up, then lint and test
# make help    the other targets
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= runs/demo
WORKERS ?= logical

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
CXX_CMD := $(if $(filter default undefined,$(origin CXX)),c++,$(firstword $(CXX)))
# Folders are listed too: they change when a file in them is removed.
SOURCES := CMakeLists.txt setup.py $(shell find csrc)
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inc')

.PHONY: help demo test test-full setup lint format sanitize clean distclean FORCE
.DELETE_ON_ERROR:

help:
	@echo 'make demo       set up, check the kernels, train n-body for 300 epochs (OUT=$(OUT))'
	@echo 'make test       set up, lint, run the test suite (PYTEST_ARGS="-k graph" for a part)'
	@echo 'make test-full  the same and every shipped GPU kernel, compiled without a GPU (an hour)'
	@echo 'make setup      create $(VENV), install the pinned packages, build the extension'
	@echo 'make lint       ruff, mypy and clang-format, changing nothing'
	@echo 'make format     let ruff and clang-format rewrite the sources'
	@echo 'make sanitize   run the kernel tests on a build with ASan and UBSan (gcc)'
	@echo 'make clean      remove what was built; make distclean removes $(VENV) too'
	@echo 'Variables: PYTHON=$(PYTHON) (3.10 or newer), VENV=$(VENV), CXX, WORKERS=$(WORKERS) (processes for tests)'

demo: setup
	$(BIN)/egnn-fast info
	$(BIN)/egnn-fast check
	$(BIN)/egnn-fast train nbody --epochs 300 --overwrite --out $(OUT)

# A process for each core, then the tests marked `alone` in one. A part may lie in one of the two: 5
# says that no test was found. Benchmarks are not timed here, and pytest-benchmark would warn of -n.
define RUN_TESTS
@echo '==> Tests, $(WORKERS) at a time'; \
$(BIN)/python -m pytest -n $(WORKERS) --benchmark-disable $(1) $(PYTEST_ARGS); many=$$?; \
echo '==> Tests that run alone'; \
$(BIN)/python -m pytest --alone --benchmark-disable $(1) $(PYTEST_ARGS); alone=$$?; \
case $$many:$$alone in 0:0 | 0:5 | 5:0) ;; 0:*) exit $$alone ;; *) exit $$many ;; esac
endef

test: lint
	$(call RUN_TESTS)

test-full: lint
	$(call RUN_TESTS,-m '')

# ---- set-up, in three stamped steps: environment, packages, extension --------------------------
setup: $(VENV)/.built

define CHECK_PYTHON
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
  echo 'egnn_fast needs Python 3.10 or newer; $(PYTHON) is:' \
    "$$( ($(PYTHON) --version || echo not there) 2>/dev/null)"; \
  echo '  name another one: make PYTHON=/path/to/python3 ...'; exit 1; }; \
$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
  echo '$(PYTHON) cannot make virtual environments; on Debian, Ubuntu: apt install python3-venv'; \
  exit 1; }
endef

define CHECK_COMPILER
command -v $(CXX_CMD) >/dev/null || { \
  echo 'egnn_fast needs a C++17 compiler, and $(CXX_CMD) was not found.'; \
  echo '  Debian, Ubuntu: apt install g++      macOS: xcode-select --install'; \
  echo '  or name one: make CXX=/path/to/compiler ...'; exit 1; }
endef

# .unfinished lies in the environment while packages are being installed. If it is still there, the
# set-up was killed half-way; if .made names another folder, the environment was copied or moved.
# Both are made again. An environment that is not ours and works is used as it is.
VENV_STATE := $(shell \
  if [ -e $(VENV)/.unfinished ]; then echo broken; \
  elif ! $(BIN)/python -m pip --version >/dev/null 2>&1; then echo broken; \
  elif [ -e $(VENV)/.made ] && [ "`cat $(VENV)/.made`" != "$(CURDIR)" ]; then echo broken; fi)
ifeq ($(VENV_STATE),broken)
$(VENV)/.made: FORCE
endif

$(VENV)/.made:
	@$(CHECK_COMPILER)
	@if [ '$(VENV_STATE)' = broken ]; then $(CHECK_PYTHON); \
	  echo '==> Creating $(VENV) with $(PYTHON)'; \
	  rm -rf $(VENV) && mkdir -p $(VENV) && touch $(VENV)/.unfinished && \
	  $(PYTHON) -m venv $(VENV) && rm $(VENV)/.unfinished; fi
	@echo '$(CURDIR)' > $@

# torch first: what comes after finds it there, and does not choose another one.
$(VENV)/.installed: $(VENV)/.made constraints.txt pyproject.toml
	@echo '==> Installing the pinned packages (minutes at first: torch is large)'
	@touch $(VENV)/.unfinished
	@$(PIP) --upgrade pip
	@$(PIP) torch
	@$(PIP) setuptools pybind11 cmake ninja
	@EGNN_FAST_NO_EXT=1 PYTHONWARNINGS=ignore $(PIP) --no-build-isolation -e '.[test,dev,triton]'
	@rm $(VENV)/.unfinished
	@touch $@

ifeq ($(wildcard egnn_fast/_core.*),)
$(VENV)/.built: FORCE
endif

# The stamp carries the time before the build: what is edited during it counts as changed.
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	@$(CHECK_COMPILER)
	@echo '==> Building the extension egnn_fast._core'
	@touch $@.begun
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@mv $@.begun $@

# ---- checks -----------------------------------------------------------------------------------
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The sanitized module goes into a folder of its own, which stands first on the path. Python is not
# sanitized, so the runtime is loaded ahead of it; libstdc++ with it, or ASan cannot see exceptions.
# Captured by sys alone, so that the report of a failure reaches the terminal. Memory that is not
# there is an error to return, as without ASan: a test asks for it. Warnings are for the build that
# is used: in this one GCC cannot unroll what it is told to.
SITE := $(CURDIR)/build/sanitize/site
sanitize: setup
	@rm -rf $(SITE)
	@echo '==> Building the extension with ASan and UBSan'
	@EGNN_FAST_SANITIZE=1 EGNN_FAST_WERROR=0 $(PIP) --no-build-isolation --no-deps --target $(SITE) .
	cd $(SITE) && \
	  LD_PRELOAD="$$($(CXX_CMD) -print-file-name=libasan.so) $$($(CXX_CMD) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	  UBSAN_OPTIONS=print_stacktrace=1 \
	  $(abspath $(BIN))/python -m pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) \
	  -p no:cacheprovider --capture=sys $(CURDIR)/tests -m "native and not values and not interpreted" \
	  --hypothesis-profile=brief $(PYTEST_ARGS)

clean:
	rm -rf build dist *.egg-info egnn_fast/_core.* .mypy_cache .pytest_cache .ruff_cache \
	  .hypothesis .benchmarks $(VENV)/.built
	find egnn_fast kernels bench tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV)
