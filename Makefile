# Everything runs in .venv, which is made on first use (python3 >= 3.11 with venv; nothing else is needed).
# Each verb does its own set-up: `make test` and `make demo` work in a fresh clone.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One thread a process: the tests run as three processes, some of which wait, and OpenMP would fight for two cores.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest
READY := $(VENV)/.installed

.PHONY: help install demo test lint types unit test-slow test-gpu test-peers test-wheel test-lowest test-newest dist bench results dev-model notebooks docs constraints clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

# What pip is held to; none for the newest versions that pyproject.toml allows
PINS ?= constraints.txt

$(READY): pyproject.toml $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python3 >= 3.11 is needed, found " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq 'pip==26.3'
	$(BIN)/python -m pip install -qq $(addprefix --build-constraint ,$(PINS)) $(addprefix -c ,$(PINS)) --group dev -e .
	@touch $@

install: $(READY) ## the environment .venv with the pinned versions of constraints.txt

demo: $(READY) ## the whole pipeline on the bundled model, into demo-out/
	$(BIN)/mmquant demo --out demo-out

test: lint types unit ## lint, types, the quick tests, and some of them against the installed wheel
	$(MAKE) test-wheel TESTS='$(SOME)'

# Some tests of each package
SOME := tests/test_errors.py tests/commands/test_errors.py tests/runs/recipe tests/calibration/statistics/test_collector.py tests/convert/fitting tests/quantize/test_fp8.py

lint: $(READY) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

unit: $(READY) ## the quick tests
	$(PYTEST) -n 3 --dist worksteal

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

# All that git knows but the packages. The dependencies come by a path file from .venv, whose own link to the checkout
# is not read there. TESTS: a part of them
WHEEL := build/wheel
AWAY := not slow and not gpu and not peers and not checkout
PACKAGES := mmquant commands runs calibration convert quantize typings
SITES := import sys; print(*(path for path in sys.path if path.endswith("site-packages")), sep="\n")

test-wheel: dist ## the quick tests against the installed wheel, away from the checkout
	rm -rf $(WHEEL) && mkdir -p $(WHEEL)/away
	$(BIN)/python -m venv --without-pip $(WHEEL)/venv
	$(BIN)/python -m pip --python $(WHEEL)/venv/bin/python install -qq --no-deps dist/*.whl
	$(BIN)/python -c '$(SITES)' > $$(echo $(WHEEL)/venv/lib/python3*/site-packages)/dev.pth
	git ls-files --cached --others --exclude-standard -- . $(PACKAGES:%=':!%') | tar c -T - | tar x -C $(WHEEL)/away
	cd $(WHEEL)/away && $(TEST_ENV) ../venv/bin/python -m pytest -n 3 --dist worksteal -m '$(AWAY)' $(TESTS)

# "click>=8.4.2" -> click==8.4.2, for every range of pyproject.toml
build/lowest.txt: pyproject.toml
	mkdir -p build
	grep -oE '"[A-Za-z0-9_-]+(\[[a-z]+\])?>=[0-9.]+' $< | sed -E 's/"([^[>]+)(\[.*\])?>=/\1==/' | sort -u > $@

test-lowest: build/lowest.txt ## the quick tests with the lowest versions that pyproject.toml allows
	$(MAKE) unit VENV=build/lowest PINS=$<

test-newest: ## the quick tests with the newest versions that pyproject.toml allows
	$(MAKE) unit VENV=build/newest PINS=

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
	PYTHONWARNINGS=ignore $(BIN)/python notebooks/run.py notebooks/*.ipynb

# Not --quiet: it hides warnings from mkdocs's strict mode too
docs: $(READY) ## the documentation site, into build/site; no network is needed
	$(BIN)/python docs/figures/draw.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo build/site/index.html

constraints: ## rewrite constraints.txt from .venv
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --all --exclude-editable --exclude pip \
	  | sed -E 's/^(torch==[^+]*)\+.*/\1/'; } > constraints.tmp && mv constraints.tmp constraints.txt

clean: ## what runs leave behind (not .venv)
	rm -rf demo-out build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
