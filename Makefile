# make demo: install, then train a teacher once, cache it, and distil several students from the cache (real digits)
# make test: install, then every test with coverage, then the kernels as they are compiled, in an interpreter of PTX
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
OUT ?= bench/results
WHEELS ?=
STEPS ?=
COMPILED := $(addprefix tests/kernels/test_,kd_loss.py terms.py ptx.py topk_lse.py)
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint docs bench gpu clean

demo: $(STAMP)
	$(BIN)/kdcache demo --out demo-out

test: $(STAMP)
	rm -f .coverage .coverage.*
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered --cov-fail-under=90 $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m gpu --ptx $(COMPILED)
	for arch in 80 100; do OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m gpu --ptx \
		--arch $$arch $(wordlist 2,3,$(COMPILED)) || exit 1; done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/, and a reference made of the docstrings. A warning is an error.
docs: $(STAMP)
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo build/docs/index.html

bench: $(STAMP)
	$(BIN)/kdcache bench shard-io
	$(BIN)/kdcache bench end-to-end
	$(BIN)/kdcache bench loss

# On a machine with a CUDA torch of its own: no dependency is touched. The tests marked gpu, then every benchmark; dated
# JSON results appear under $(OUT). WHEELS=FOLDER: wheels of modules that the machine lacks, installed without theirs.
# STEPS=tests,loss,...: some of it.
gpu:
	$(PYTHON) -m kdcache.bench.gpu --out "$(OUT)" --wheels "$(WHEELS)" --steps "$(STEPS)"

$(STAMP): pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build docs/api dist *.egg-info demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
