PY := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help setup demo test chaos check format golden clean
.DEFAULT_GOAL := help

help:  ## show the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 16

setup: .venv/.stamp  ## make .venv with the versions of requirements.lock

.venv/.stamp: requirements.lock
	python3.11 -m venv .venv
	$(PY) -m pip install --quiet -r requirements.lock
	$(PY) -m pip install --quiet --no-deps --no-build-isolation --config-settings editable_mode=compat --editable .
	touch $@

demo: setup  ## see a longer window on the lab model (RECIPE=cepe: contexts in an encoder)
	bash $(if $(filter cepe,$(RECIPE)),lab/studies/cepe.sh demo,launch/demo.sh)

test: setup  ## run every test that needs no GPU
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 2 --dist loadfile

chaos: setup  ## kill a run 20 times, and compare its end with that of one left alone (twice)
	OMP_NUM_THREADS=1 $(PY) tests/dist/chaos.py
	OMP_NUM_THREADS=1 $(PY) tests/dist/chaos.py --beside

check: setup  ## format, lint, types, imports: look, do not touch
	ruff format --check . && ruff check . && mypy && lint-imports

format: setup  ## rewrite the sources as check wants them
	ruff check --select I --fix . && ruff format .

golden: setup  ## rewrite the golden files (say why under Numerics in CHANGELOG.md)
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/golden --update-golden

clean:  ## remove what the targets made, .venv included
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
