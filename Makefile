# make run: both notebooks, top to bottom.  make test: the whole test suite.  Nothing to install by hand.
NOTEBOOKS := 01-train_embedding_with_validation.ipynb 02-C-MTEB_retrieval_evaluation.ipynb
PYTHON ?= python3
BIN := .venv/bin
# Python compiles what it imports, 0.15 GB of byte code; pip would compile everything, 0.45 GB.
PIP = $(BIN)/pip install --disable-pip-version-check --no-compile
# On Linux pip's usual torch brings 4 GB of CUDA libraries. Where no NVIDIA GPU is seen, torch's own index gives the
# build for CPUs; TORCH_INDEX= asks pip's usual index, TORCH_INDEX=https://… another one.
ifeq ($(shell uname -s 2>/dev/null),Linux)
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi 2>/dev/null),,https://download.pytorch.org/whl/cpu)
endif

.PHONY: run install test lab lint export bench faults study recipes python-version
.DEFAULT_GOAL := run

run: .venv/.run
	$(BIN)/python -m embedding_tutorial run

# Without the notebooks: enough for the commands on your own pairs.
install: .venv/.run

# Two test files at a time, on one thread each: on 2 cores that takes two thirds of the time.
test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lab: .venv/.run
	$(BIN)/jupyter lab $(firstword $(NOTEBOOKS))

lint: .venv/.dev
	$(BIN)/ruff check .

# The teaching code lives in the notebooks; these two modules are written from their `#| export` cells.
export: .venv/.dev
	$(BIN)/python -c "from nbdev.export import nb_export; [nb_export(n, lib_path='embedding_tutorial') for n in '$(NOTEBOOKS)'.split()]"

bench: .venv/.dev
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/encoding.py
	$(BIN)/python benchmarks/search.py

# Kills, full disks, two processes at once, damaged files: at most ten minutes on 2 cores.
faults: .venv/.dev
	$(BIN)/python benchmarks/faults.py

# Goes on where it stopped; from nothing it takes about nine hours on 2 cores (half the sum of the cells in the two results: two run at a time).
study: .venv/.dev
	$(BIN)/python benchmarks/study.py
	$(BIN)/python benchmarks/study.py --data data/pocket_mbpp.json --out benchmarks/results/study_pocket.json --only base default rewrites
	$(BIN)/python benchmarks/study.py --report

recipes: .venv/.dev
	$(BIN)/python recipes/run_all.py

python-version:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 11) else f"Python 3.11 or newer is needed, and $(PYTHON) is {v}. Try: make run PYTHON=python3.11")'

.venv/.run: requirements.txt | python-version
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),@$(PIP) --quiet --no-deps --retries 0 --timeout 10 \
		--index-url $(TORCH_INDEX) $(shell grep '^torch==' requirements.txt) \
		|| echo "$(TORCH_INDEX) did not give this torch: pip's usual index is asked.")
	$(PIP) -r requirements.txt
	touch $@

.venv/.dev: .venv/.run requirements-dev.txt recipes/requirements.txt
	$(PIP) -r requirements-dev.txt
	$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null || true  # torch keeps a file in a newer Python's syntax
	touch $@
