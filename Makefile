PY := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --durations=15

.PHONY: help setup demo test-fast test chaos check format golden clean
.DEFAULT_GOAL := help

help:  ## show the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

setup: .venv/.stamp  ## make .venv with the versions of requirements.lock, about two minutes

.venv/.stamp: requirements.lock
	@echo "setup 1/3: .venv with $$(python3.11 --version) of $$(command -v python3.11)"
	@python3.11 -m venv .venv && date +%s >.venv/.began
	@echo "setup 2/3: $$(grep -c == requirements.lock) packages of requirements.lock, about two minutes"
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@echo "setup 3/3: longctx itself, editable"
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--config-settings editable_mode=compat --editable .
	@$(PY) -c "from importlib.metadata import version as v; \
		print('ready:', *(f'{n} {v(n)},' for n in ('torch', 'transformers', 'deepspeed')), 'longctx', v('longctx'))"
	@echo "took $$(( $$(date +%s) - $$(cat .venv/.began) )) s; make test-fast checks it"
	@touch $@

demo: setup  ## see a longer window on the lab model (RECIPE=cepe: contexts in an encoder)
	bash $(if $(filter cepe,$(RECIPE)),lab/studies/cepe.sh demo,launch/demo.sh)

test-fast: setup  ## the unit tests, the laws and the house rules, about four minutes on two cores
	$(PYTEST) --numprocesses 2 --dist loadfile -m "not slow and not gpu and not long" \
		tests/unit tests/laws tests/house

test: setup  ## every test that needs no GPU, about ten minutes on two cores
	$(PYTEST) --numprocesses 2 --dist loadfile

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
