# Every target works from a clean clone with nothing but python3: the first one makes .venv, later ones use it again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)
# pip refuses rather than install into the Python behind a broken .venv.
export PIP_REQUIRE_VIRTUALENV := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## Draw Fashion-MNIST pictures with the dense and the accelerated model, into demo/
	$(BIN)/actvar sample --model fashion-mnist --labels 0-9 --per-class 8 --compare --out demo
	@echo "The pictures are in demo/:" && ls demo

test: $(INSTALLED) ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --benchmark-disable

lint: $(INSTALLED) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## Mend style and formatting in place
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean: ## Remove .venv, the demo's pictures and every cache
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first, by its exact version, so that the second call finds it and resolves no other build of it;
# setuptools comes with it because an editable install without build isolation takes the one in .venv.
$(INSTALLED): setup.py constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt '$(TORCH)' setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev,hub]'
	@touch $@
