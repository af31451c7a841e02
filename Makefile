# make demo | test | lint : set up .venv on first use, then run. make gpu : any python with torch, no set-up.
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PYTHON ?= python3
DEVICE ?= cpu
OUT    ?= benchmarks/results

SOURCES := pyproject.toml setup.py constraints.txt $(shell find csrc -name '*.cpp' -o -name '*.h')
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CPU_TORCH := https://download.pytorch.org/whl/cpu

.PHONY: demo test lint gpu bench clean

demo: $(STAMP)
	$(BIN)/mmicl demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu and not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run --op all --device $(DEVICE) --runs 3 --out $(OUT)

gpu: export PYTHONPATH := .
gpu:
	$(PYTHON) -m pytest -m gpu
	$(PYTHON) -m benchmarks.run --op all --device cuda --json $(OUT)/cuda.json

clean:
	rm -rf $(VENV) build dist *.egg-info mmicl_kernels/*.so .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: the extension is compiled against it, so the build sees the environment
# (no isolation). The CPU wheel keeps the pinned triton; PyPI's CUDA wheel would demand its own.
$(STAMP): $(SOURCES)
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(PIP) -c constraints.txt "torch==2.13.0+cpu" || $(PIP) -c constraints.txt --extra-index-url $(CPU_TORCH) "torch==2.13.0+cpu"
	$(PIP) -c constraints.txt setuptools wheel pybind11 ninja
	$(PIP) -c constraints.txt --no-build-isolation -e ".[all]"
	$(BIN)/python -c "from mmicl_kernels import _extension; print('C++ kernels:', _extension.status())"
	touch $@
