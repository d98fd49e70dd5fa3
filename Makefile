# `make` alone lists the targets. They work in .venv, `make figures` in .venv-figures; each is made when it is not there.
.DEFAULT_GOAL := help
.PHONY: help quickstart figures test lab export readme clean constraints wheel

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && echo $$p && break; done)
B := .venv/bin
F := .venv-figures/bin
UV := $(B)/uv pip
REQUIREMENTS := settings.ini setup.py pyproject.toml constraints.txt
export PYTHONUTF8 := 1
quickstart test: export OMP_NUM_THREADS ?= 1   # models this small gain nothing from more, and lose much where cores are shared

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*##  *\(.*\)/make \1~\2/p' Makefile | awk -F~ '{ printf "%-18s %s\n", $$1, $$2 }'

quickstart: .venv/notebooks.stamp  ## the whole method on embedded data: a table here, the executed notebook under runs/quickstart
	@mkdir -p runs/quickstart
	$(B)/python -m papermill nbs/experiments/quickstart.ipynb runs/quickstart/quickstart.ipynb $(PARAMETERS)
	@$(B)/python tools/show.py runs/quickstart/quickstart.ipynb

figures: .venv-figures/light.stamp  ## figures, pages of runs and README's results from the records: no torch, no data, no network
	$(F)/python tools/figures.py

test: .venv/dev.stamp  ## what CI runs: generated files in sync, library notebooks, experiments with smoke defaults, pytest
	$(B)/python tools/sync.py
	$(B)/python tools/smoke.py
	$(B)/python -m pytest

lab: .venv/notebooks.stamp  ## JupyterLab at the root of the repository, so that pictures and links in notebooks work
	$(B)/python -m jupyterlab nbs/index.ipynb

export: .venv/dev.stamp  ## the package from the notebooks
	$(B)/python tools/sync.py export

readme: .venv/dev.stamp  ## README.md from nbs/index.ipynb
	$(B)/python tools/sync.py readme

clean: .venv/dev.stamp  ## notebooks without execution counts and foreign metadata
	$(B)/python tools/sync.py clean

constraints: .venv/uv.stamp  ## the newest versions that fit settings.ini, into constraints.txt
	$(UV) compile --quiet --upgrade setup.py --extra dev --universal --python-version 3.11 --no-annotate --no-header -o constraints.txt

wheel: .venv/dev.stamp  ## the wheel, under dist
	$(B)/python -m build --wheel --no-isolation

%/uv.stamp:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; say which: make PYTHON=/path/to/python3 ..."; exit 1; }
	test -x $*/bin/python || $(PYTHON) -m venv $*
	@$*/bin/python -m pip --version > /dev/null 2>&1 || $*/bin/python -m ensurepip
	$*/bin/python -m pip install --quiet --disable-pip-version-check uv
	@touch $@

.venv-figures/light.stamp: .venv-figures/uv.stamp settings.ini constraints.txt
	$(F)/python -m uv pip install --quiet --python $(F)/python -c constraints.txt $$(sed -n 's/^figures_requirements = //p' settings.ini)
	@touch $@

.venv/notebooks.stamp: .venv/uv.stamp $(REQUIREMENTS)
	$(UV) install --python $(B)/python -e '.[notebooks]' -c constraints.txt
	@touch $@

.venv/dev.stamp: .venv/uv.stamp $(REQUIREMENTS)
	$(UV) install --python $(B)/python -e '.[dev]' -c constraints.txt
	@touch $@ .venv/notebooks.stamp
