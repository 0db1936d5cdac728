# Everything runs in .venv, which is made on first use (python3 >= 3.11 with venv; nothing else is needed).
# Each verb does its own set-up: `make test` and `make demo` work in a fresh clone.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One thread a process: the tests run as two processes, and OpenMP in both would fight for two cores.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest
READY := $(VENV)/.installed

.PHONY: help install demo test lint types unit test-slow test-gpu test-peers test-wheel dist bench results dev-model notebooks docs constraints clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python3 >= 3.11 is needed, found " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq 'pip==26.3'
	$(BIN)/python -m pip install -qq --build-constraint constraints.txt -c constraints.txt --group dev -e .
	@touch $@

install: $(READY) ## the environment .venv with the pinned versions of constraints.txt

demo: $(READY) ## the whole pipeline on the bundled model, into demo-out/
	$(BIN)/mmquant demo --out demo-out

test: lint types unit ## lint, types and the quick tests

lint: $(READY) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

unit: $(READY) ## the quick tests alone
	$(PYTEST) -n 2

test-slow: $(READY) ## tests of minutes: packaging, long comparisons
	$(PYTEST) -m slow

test-gpu: $(READY) ## tests that need a CUDA device
	$(PYTEST) -m gpu

# Other tools pin versions that exclude ours, so each has an environment of its own: tests/peers/NAME.txt -> .peers/NAME
PEERS := $(patsubst tests/peers/%.txt,.peers/%/.installed,$(wildcard tests/peers/*.txt))

.peers/%/.installed: tests/peers/%.txt
	test -x .peers/$*/bin/python || $(PYTHON) -m venv .peers/$*
	.peers/$*/bin/python -m pip install -qq 'pip==26.3'
	.peers/$*/bin/python -m pip install -qq --only-binary=:all: -r $<
	@touch $@

# llama.cpp's own libraries, for what no wheel carries (the imatrix loader)
NODE_LLAMA := .peers/node-llama-cpp/.installed

$(NODE_LLAMA):
	mkdir -p $(@D)
	cd $(@D) && npm pack --silent @node-llama-cpp/linux-x64@3.22.1 && tar xzf node-llama-cpp-linux-x64-3.22.1.tgz
	@touch $@

# AutoAWQ is archived and comes as a source archive; one file of it, which needs nothing but torch, is its reader
AUTOAWQ := .peers/autoawq/.installed

$(AUTOAWQ): $(READY)
	mkdir -p $(@D)
	$(BIN)/python -m pip download -qq --no-deps --no-build-isolation --no-binary autoawq -d $(@D) autoawq==0.2.9
	cd $(@D) && tar xzf autoawq-0.2.9.tar.gz
	@touch $@

test-peers: $(READY) $(PEERS) $(NODE_LLAMA) $(AUTOAWQ) ## conformance with auto-gptq, AutoAWQ and llm-compressor themselves
	$(PYTEST) -m peers

dist: $(READY) ## the sdist and the wheel, into dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation

# The dependencies come from .venv by a path file, under which .venv's own link to the checkout is not read.
WHEEL := build/wheel
AWAY := tests bench docs notebooks README.md CONTRIBUTING.md Makefile constraints.txt pyproject.toml LICENSE
NEED_GIT := --ignore=tests/test_packages.py --ignore=tests/test_packaging.py

test-wheel: dist ## the quick tests against the installed wheel, away from the checkout
	rm -rf $(WHEEL) && mkdir -p $(WHEEL)/away
	$(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL)/venv/bin/python -m pip install -qq --no-deps dist/*.whl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' > $$(echo $(WHEEL)/venv/lib/python3*/site-packages)/dev.pth
	tar c --exclude=__pycache__ $(AWAY) | tar x -C $(WHEEL)/away
	cd $(WHEEL)/away && $(TEST_ENV) ../venv/bin/python -m pytest -n 2 $(NEED_GIT)

bench: $(READY) ## what can be measured; make bench NAME=prefetch ARGS="--runs 1" measures it
ifdef NAME
	$(BIN)/python bench/$(NAME).py $(ARGS)
else
	@for script in bench/[a-z]*.py; do printf '%-14s ' $$(basename $$script .py); sed -n '1s/"""//gp' $$script; done
endif

# DEBS: unpacked Debian packages (bench/dev_model/README.md lists them); the training wants a GPU
DEV_MODEL := build/dev-model

dev-model: $(READY) ## train the development model that bench/domains.py judges by: make dev-model DEBS=folder
	mkdir -p $(DEV_MODEL)
	$(BIN)/python bench/dev_model/collect.py $(DEBS) $(DEV_MODEL)/corpus.json
	$(BIN)/python bench/dev_model/pack.py $(DEV_MODEL)/corpus.json $(DEV_MODEL)/text
	$(BIN)/python bench/dev_model/train_model.py $(DEV_MODEL)/text $(DEV_MODEL)

results: $(READY) ## docs/results.md from the stored results in docs/results/
	$(BIN)/python bench/results.py

notebooks: $(READY) ## run the notebooks and keep their outputs
	rm -rf notebooks/m27-*
	PYTHONWARNINGS=ignore $(BIN)/jupyter execute --inplace notebooks/*.ipynb

docs: $(READY) ## the documentation site, into build/site; no network is needed
	$(BIN)/python docs/figures/draw.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo build/site/index.html

constraints: ## rewrite constraints.txt from .venv
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --all --exclude-editable --exclude pip \
	  | sed -E 's/^(torch==[^+]*)\+.*/\1/'; } > constraints.tmp && mv constraints.tmp constraints.txt

clean: ## what runs leave behind (not .venv)
	rm -rf demo-out build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
