# The project's commands. `make help` lists them.
#   EXTRA_INDEX=URL   one more package index for pip (for instance one with CPU builds of torch)
#   SGLANG=gpu        install stock sglang with its own dependencies (default: gpu where nvidia-smi works, else cpu)
#   PYTEST='…'        arguments of pytest instead of all tests side by side: make test PYTEST='tests/launcher -k port'
#   JOBS=N            tests side by side (default: 3, or 4 from four cores on; they often wait for a server)
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
BENCH ?= --everything
PYTHON_IS_RECENT = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kt-launch needs Python 3.11 or newer: make PYTHON=python3.11 …")'
NO_COMPILER = kt-launch needs a C++20 compiler, such as g++ 11 or newer; CXX=… names one that is not c++
COMPILES = echo 'int main() {}' | $${CXX:-c++} -std=c++20 -fsyntax-only -x c++ - 2>/dev/null || { echo "$(NO_COMPILER)" >&2; exit 1; }
VENV ?= .venv
CHECKS ?= .venv-lint
WHEEL ?= .venv-wheel
EXTRA = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$(1)"], sep="\n")
SGLANG_PIN = $(shell $(PYTHON) -c '$(call EXTRA,gpu)')
SGLANG ?= $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
JOBS ?= $(shell n=$$(nproc); echo $$((n < 4 ? 3 : 4)))
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(EXTRA_INDEX),--extra-index-url $(EXTRA_INDEX))
SOURCES = $(shell find conf launcher kernels plugins demo/model demo/west -type f -not -name '*.pyc' 2>/dev/null)
CXX_SOURCES = $(shell find kernels tests/kernels benchmarks -name "*.cpp" -o -name "*.h")

.PHONY: help demo demo-train test nightly chaos fuzz fidelity soak soak-served sanitize lint format bench install dev wheel clean
help: ## list these commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

demo: install ## serve the demo model, ask it with and without its adapter
	@$(VENV)/bin/python demo/ask.py

test: install ## all tests, against the installed wheel
	$(RUN_TESTS)

# Which tests stay together, and in which order they run, is tests/conftest.py's.
SIDE_BY_SIDE = --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
RUN_TESTS = $(VENV)/bin/python -m pytest $(or $(PYTEST),$(SIDE_BY_SIDE) --durations 10)

nightly: install wheel ## hours: what `make test` shows in process on servers, other cases of each property, bare installs
	$(VENV)/bin/python -m pytest --nightly -m nightly --durations 10
	$(MAKE) --no-print-directory chaos soak-served
	$(MAKE) --no-print-directory fuzz

fuzz: install ## an hour of damaged files for the readers, others each time; `make test` has the same few
	$(VENV)/bin/python -m pytest tests/weights/test_fuzz.py tests/launcher/test_tensorfile.py \
	  tests/launcher/test_hostile_files.py --hypothesis-profile=hour --timeout=0

wheel: $(WHEEL)/.installed ## dist/: an sdist, and the wheel that is built from it, repaired for other machines (manylinux)
	rm -rf dist
	$(WHEEL)/bin/python -m build --outdir dist/built .
	PATH="$(CURDIR)/$(WHEEL)/bin:$$PATH" auditwheel repair --wheel-dir dist dist/built/*.whl
	mv dist/built/*.tar.gz dist
	rm -r dist/built

lint: $(CHECKS)/.installed ## ruff, mypy --strict, clang-format, in a small environment of their own (.venv-lint)
	$(CHECKS)/bin/ruff check .
	$(CHECKS)/bin/ruff format --check .
	$(CHECKS)/bin/mypy
	$(CHECKS)/bin/clang-format --dry-run --Werror $(CXX_SOURCES)

fidelity: install ## docs/fidelity.md anew: every family, head, disk and adapter layout (24 servers, half an hour)
	PYTHONPATH=tests/support:tests/fixtures OMP_NUM_THREADS=1 $(VENV)/bin/python tests/fixtures/fidelity.py

chaos: install ## half an hour: processes killed, hostile files and requests, hangs, full disks, races;  CHAOS="--minutes 5 --report FILE"
	PYTHONPATH=tests/support:tests/fixtures $(VENV)/bin/python tests/chaos/chaos.py $(CHAOS)

soak: install ## a million forwards: memory does not grow
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/kernels/soak.py

soak-served: install ## half an hour of load and adapter swaps on one server: no wrong answer, memory flat;  SOAK="--minutes 5"
	PYTHONPATH=tests/support:tests/fixtures $(VENV)/bin/python tests/chaos/served_soak.py $(SOAK)

sanitize: install ## the kernels under ThreadSanitizer, then under AddressSanitizer and UndefinedBehaviorSanitizer
	$(call SANITIZED,thread,race)
	$(call SANITIZED,address$(COMMA)undefined,overflow)
	$(call SANITIZED,address$(COMMA)undefined,shift)

# Builds the program with a sanitizer, runs it, and demands that the sanitizer finds a mistake made on purpose.
COMMA := ,
define SANITIZED
	$(VENV)/bin/cmake -S kernels -B build/sanitize-$(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja -DKT_SANITIZE=$(1) >/dev/null
	$(VENV)/bin/cmake --build build/sanitize-$(1)
	build/sanitize-$(1)/sanitized
	! build/sanitize-$(1)/sanitized --plant $(2) >/dev/null 2>&1 || { echo "-fsanitize=$(1) does not find a planted $(2)"; exit 1; }
endef

bench: install ## measure kernels and launcher against the machine and other libraries (an hour);  BENCH="--quick --json FILE"
	$(VENV)/bin/python benchmarks/run.py $(BENCH)

demo-train: ## train the demo model and adapter again, in an environment of their own (.venv-train)
	test -x .venv-train/bin/python || $(PYTHON) -m venv .venv-train
	.venv-train/bin/python -m pip install --quiet $(if $(EXTRA_INDEX),--extra-index-url $(EXTRA_INDEX)) -r demo/requirements-train.txt
	OMP_NUM_THREADS=1 .venv-train/bin/python demo/train.py
	OMP_NUM_THREADS=1 .venv-train/bin/python demo/evaluate.py

format: $(CHECKS)/.installed ## rewrite the sources in the house's format
	$(CHECKS)/bin/ruff check --fix .
	$(CHECKS)/bin/ruff format .
	$(CHECKS)/bin/clang-format -i $(CXX_SOURCES)

# What the checks read besides the sources: the launcher's own requirements, neither torch nor SGLang, and no build.
$(CHECKS)/.installed: requirements/lint.txt pyproject.toml
	$(PYTHON_IS_RECENT)
	test -x $(CHECKS)/bin/python || $(PYTHON) -m venv $(CHECKS)
	$(CHECKS)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' >$(CHECKS)/requirements.txt
	$(CHECKS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/lint.txt -r $(CHECKS)/requirements.txt
	touch $@

$(WHEEL)/.installed: requirements/wheel.txt
	$(PYTHON_IS_RECENT)
	test -x $(WHEEL)/bin/python || $(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/wheel.txt
	touch $@

install: $(VENV)/.installed ## the environment in .venv with the wheel of this checkout

$(VENV)/.sglang: pyproject.toml requirements/dev.txt
	@$(PYTHON_IS_RECENT)
	@$(COMPILES)
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(MAKE) --no-print-directory sglang-$(SGLANG)
	@touch $@

.PHONY: sglang-cpu sglang-gpu
# On a CPU SGLang is installed without what it needs on a GPU alone, of which pip would warn in dozens of lines.
sglang-cpu:
	@echo "installing torch and SGLang for a CPU: some minutes"
	@$(PYTHON) -c '$(call EXTRA,cpu)' >$(VENV)/sglang-cpu.txt
	@$(PIP) --no-warn-conflicts -r $(VENV)/sglang-cpu.txt -r requirements/dev.txt
	@$(PIP) --no-deps $(SGLANG_PIN)
sglang-gpu:
	@echo "installing SGLang, with torch for a GPU: some minutes and gigabytes"
	@$(PIP) $(SGLANG_PIN)
	@$(PIP) -r requirements/dev.txt

$(VENV)/.installed: $(VENV)/.sglang pyproject.toml $(SOURCES)
	@echo "compiling the kernels and installing kt-launch: a minute or two"
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PIP) --no-build-isolation .
	@rm -f $(VENV)/.dev
	@touch $@

dev: $(VENV)/.dev ## an editable install: a change in Python acts at once; again after a change in C++, which compiles only that
	$(VENV)/bin/cmake --build build/dev
	$(VENV)/bin/cmake --install build/dev --prefix "$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')" >/dev/null

$(VENV)/.dev: $(VENV)/.sglang pyproject.toml
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PIP) --no-build-isolation --config-settings build-dir=build/dev --editable .
	rm -f $(VENV)/.installed
	touch $@

clean: ## remove what was built, keep the environment
	rm -rf build dist $(VENV)/.installed
