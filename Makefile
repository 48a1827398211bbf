# Everything runs in .venv, which each target makes and completes as it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types zoo bench value gpu docs site dist clean

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo  ## train a segmentation model on real photographs under audit
	$(BIN)/pl-normkit run segmentation

test: $(VENV)/.test lint types  ## lint, types and the whole test-suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not zoo and not gpu"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy -p pl_normkit

$(VENV)/.zoo: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[test,zoo]"
	touch $@ $(VENV)/.test $(VENV)/.demo

zoo: $(VENV)/.zoo  ## models of timm, smp, torchvision, transformers, diffusers, monai and torchaudio: findings as CSV
	$(BIN)/python benchmarks/zoo.py
	$(BIN)/python benchmarks/zoo_libraries.py
	$(BIN)/python benchmarks/loss_zoo.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m zoo

bench: $(VENV)/.test  ## every benchmark that runs without a GPU
	for script in benchmarks/[a-z]*.py; do case $$script in *zoo.py|*/zoo_libraries.py|*/zoo_truth.py|*/zoo_architectures.py|*/gpu.py) ;; *) $(BIN)/python $$script || exit 1;; esac; done

value: $(VENV)/.test  ## every remedy trained with and without on fresh seeds: docs/value.md; an hour on one core
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python benchmarks/value

gpu:  ## everything that needs a GPU, in 8 minutes, with the Python that has a torch for it (PYTHON=...); installs nothing
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py

$(VENV)/.site: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[site]"
	touch $@

site: $(VENV)/.site  ## the pages of docs/ as a web site, in site/; a broken link is an error
	$(BIN)/mkdocs build --strict

docs: $(VENV)/.test  ## rule pages from the rules' own docstrings
	$(BIN)/python docs/build.py

dist: $(VENV)/bin/python  ## wheel and sdist, the same bytes for the same commit
	$(BIN)/python -m pip install --quiet build twine
	$(BIN)/python .ci/distribute.py dist
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist site runs *.egg-info .hypothesis .mypy_cache .ruff_cache
