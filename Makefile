# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
CORES ?= $(shell nproc 2>/dev/null || echo 2)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SNAKEMAKE := $(BIN)/snakemake --cores $(CORES)
.DEFAULT_GOAL := help

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

# Made anew whenever the lock changes; the stamp is written last, so a killed installation is not taken for a whole one.
$(READY): requirements.lock
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "Python 3.11 or 3.12 is needed; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	"$(PYTHON)" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

.PHONY: env
env: $(READY) ## make .venv from the lock

.PHONY: demo
demo: $(READY) ## the whole workflow on a simulated screen, then its report
	$(SNAKEMAKE)
	$(SNAKEMAKE) --report results/report.zip
	@rm -rf results/report && $(BIN)/python -m zipfile -e results/report.zip results/
	@echo
	@echo "Report:  results/report/report.html (open it in a browser; the same as results/report.zip)"
	@echo "Tables:  results/simulated/tables/    Figures: results/simulated/figures/"

.PHONY: test
test: $(READY) ## unit and workflow tests
	$(BIN)/python -m pytest

.PHONY: lint
lint: $(READY) ## ruff, snakefmt, snakemake --lint, generated files up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint
	cd workflow_scripts && ../$(BIN)/python -m dbdiffusion.config.render --check

.PHONY: format
format: $(READY) ## format code, render config and docs
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile rules
	cd workflow_scripts && ../$(BIN)/python -m dbdiffusion.config.render

.PHONY: bench
bench: $(READY) ## cost, speed and memory of the generator, of inference and of location
	PYTHONPATH=workflow_scripts $(BIN)/python tests/benchmarks/bench_generative.py
	PYTHONPATH=workflow_scripts $(BIN)/python tests/benchmarks/bench_inference.py
	PYTHONPATH=workflow_scripts $(BIN)/python tests/benchmarks/bench_locate.py

.PHONY: calibration
calibration: $(READY) ## the calibration study on simulated screens (long; resumable)
	$(SNAKEMAKE) calibration_study

.PHONY: lock
lock: ## resolve requirements.in anew into requirements.lock and the pins of envs/
	"$(PYTHON)" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.in
	( echo "# Locked environment of the workflow (Python 3.11 and 3.12). Made by 'make lock' from requirements.in."; \
	  $(BIN)/python -m pip freeze --exclude pip --exclude setuptools --exclude wheel | sed 's/^\(torch==[0-9.]*\)+.*/\1/' ) > requirements.lock
	$(BIN)/python envs/pin.py
	@touch $(READY)

.PHONY: clean
clean: ## remove results (downloads are kept)
	find results -mindepth 1 -maxdepth 1 ! -name .gitkeep ! -name downloads -exec rm -rf {} +
	rm -rf .snakemake
