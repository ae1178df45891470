# Every target works from a clean clone with nothing but python3: the first one makes .venv, later ones use it again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)
# pip refuses rather than install into the Python behind a broken .venv.
export PIP_REQUIRE_VIRTUALENV := 1

.DEFAULT_GOAL := help
SOAK_SECONDS ?= 600
.PHONY: help demo test test-slow test-fast soak bench bench-full bench-against plots docs docs-check paper paper-train compile-check gpu triton-matrix lint format clean
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --benchmark-disable --durations 10
OR_NO_TEST := || [ $$? -eq 5 ] # 5: no Triton here, so no test
# The method, its references and its C++ kernels; bad input and bad files; the small commands.
FAST := $(addprefix tests/,$(addsuffix .py,$(addprefix kernels/test_,arguments_and_backends cpu_attention cpu_conv3x3 \
	cpu_group_norm cpu_rows expert_ffn_reference public_draw residual_norm_reference token_draw scatter_reference \
	subset_attention_reference token_select_reference) $(addprefix model/test_,adapter autoencoder \
	block_bit_for_bit checkpoint checkpoint_bad_files config golden graphs block_cache weight_override) \
	$(addprefix robustness/test_,bad_input verify_rounding) $(addprefix training/test_,distill muon)))
# Releases of Triton that the kernels are tested with; "triton" alone is the newest. The interpreter of 3.6 needs NumPy
# before 2.4.
TRITONS := triton==3.6.0 triton==3.8.0 triton

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## Draw Fashion-MNIST pictures with the dense and the accelerated model, into demo/
	$(BIN)/actvar sample --model fashion-mnist --labels 0-9 --per-class 8 --adapter best --compare --out demo
	@echo "The pictures are in demo/:" && ls demo

test: $(INSTALLED) ## Run all tests except the slow ones, in under 20 minutes; what CI runs
	$(PYTEST) -m "not slow" --ignore tests/interpreter
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow" tests/interpreter $(OR_NO_TEST)

test-slow: $(INSTALLED) ## Run the tests that take more than some seconds each, before an issue is called resolved
	$(PYTEST) -m slow --ignore tests/interpreter
	TRITON_INTERPRET=1 $(PYTEST) -m slow tests/interpreter $(OR_NO_TEST)

test-fast: $(INSTALLED) ## Run a part of the tests in under 3 minutes, while you work
	$(PYTEST) -m "not slow" $(FAST)

soak: $(INSTALLED) ## Damaged files, faults, kills and long runs for SOAK_SECONDS (600); one line of counts
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m soak --seconds $(SOAK_SECONDS)

bench: $(INSTALLED) ## Time operations, samples, memory and scaling on this CPU, into benchmarks/results/
	$(BIN)/python -m benchmarks --subset cpu

bench-full: $(INSTALLED) ## The same for every model, batch, rate and type; hours on a CPU
	$(BIN)/python -m benchmarks --subset all

bench-against: $(INSTALLED) ## Compare with an earlier commit, make bench-against REV=main; fails if it got slower
	$(BIN)/python -m benchmarks --subset cpu --against $(REV)

plots: $(INSTALLED) ## Draw docs/images/bench-*.png from benchmarks/results/
	$(BIN)/python -m benchmarks.plots

docs: $(INSTALLED) ## Build the documentation as a site, into site/; open site/index.html
	$(BIN)/python -c 'import mkdocs' 2>/dev/null || $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python -m scripts.docs_site

docs-check: $(INSTALLED) ## Check that every figure of README.md and docs/ has a row behind it
	$(BIN)/python -m benchmarks.docs_check --commands

paper-train: $(INSTALLED) ## Train the adapters behind the paper's tables that are missing, into paper-work/; resumes
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m benchmarks.paper.train

paper: $(INSTALLED) ## Measure those adapters and write docs/paper.md, its tables and pictures; resumes
	$(BIN)/python -m benchmarks.paper

compile-check: $(INSTALLED) ## Compile every kernel for every GPU architecture, without a GPU, and check the machine code
	$(BIN)/python -m actvar_kernels.compile_check

gpu: ## On a machine with a GPU: check and time every kernel there; PYTHON names its Python, nothing is installed
	$(PYTHON) -m benchmarks.gpu --json gpu.json

triton-matrix: ## Interpreter tests and compile check on other releases of Triton, each in an environment of its own
	for triton in $(TRITONS); do \
		environment=.venv-$$triton; \
		$(PYTHON) -m venv $$environment && \
		$$environment/bin/python -m pip install --quiet '$(TORCH)' setuptools && \
		(grep -v '^triton\|^numpy' constraints.txt; echo 'numpy<2.4') > $$environment/constraints.txt && \
		$$environment/bin/python -m pip install --quiet -c $$environment/constraints.txt --no-build-isolation -e '.[dev]' && \
		$$environment/bin/python -m pip install --quiet --upgrade --no-deps "$$triton" && \
		OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $$environment/bin/python -m pytest -q -n 2 --dist worksteal tests/interpreter && \
		$$environment/bin/python -m actvar_kernels.compile_check --quick || exit 1; \
	done

lint: $(INSTALLED) ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(INSTALLED) ## Mend style and formatting in place
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean: ## Remove .venv, the demo's pictures and every cache
	rm -rf $(VENV) .venv-triton* demo site build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first, by its exact version, so that the second call finds it and resolves no other build of it;
# setuptools comes with it because an editable install without build isolation takes the one in .venv.
$(INSTALLED): setup.py constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt '$(TORCH)' setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev,hub]'
	@touch $@
