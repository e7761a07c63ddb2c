# Two commands do everything on a fresh Debian or Ubuntu machine with Python 3.11 or 3.12:
#
#   make quickstart    set up, train a draft online for a 135M LLM, measure it in a real SGLang server
#   make test          set up, run the linters and the tests (ARGS="-m slow": more of the same)
#
# and one is for all day: make check, the linters and the unit tests, in under two minutes.
#
# Variables:
#   TORCH_INDEX_URL    package index for torch, where the default index would bring the CUDA build:
#                      make quickstart TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
#   KIND               kind of draft that quickstart trains (eagle3): make quickstart KIND=dflash
#   PYTHON             interpreter for the virtual environment (python3)
#   ARGS               more arguments: config overrides for quickstart, pytest arguments for test

PYTHON ?= python3
TORCH_INDEX_URL ?=
ARGS ?=
KIND ?=
BIN := .venv/bin
SGLANG := sglang==0.5.23
TORCH := torch==2.13.0
UV := uv==0.13.8
PYTEST := $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart check test setup tools lint clean
.DEFAULT_GOAL := setup

quickstart: setup
	$(BIN)/torchspec quickstart $(if $(KIND),--kind $(KIND)) $(ARGS)

check: lint
	$(PYTEST) tests/unit $(ARGS)

test: tools lint
	$(PYTEST) $(ARGS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

setup: .venv/.complete
	@$(BIN)/python -m torchspec.inference.sglang_patch apply
	@$(BIN)/python -m torchspec.data.builtin_target

# The stamp is written last, so an interrupted set-up goes on where it was.
.venv/.complete: pyproject.toml requirements.txt | .venv/.system
	@echo "installing the Python packages (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	  || { echo "error: TorchSpec needs Python 3.11 or 3.12: make PYTHON=python3.11 ..." >&2; rm -rf .venv; exit 1; }
	@$(BIN)/pip install --quiet $(UV)
	@$(BIN)/pip install --quiet $(TORCH) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL))
	@VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet --compile-bytecode --constraint requirements.txt --editable '.[cpu,dev,wandb,mlflow]'
	@VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet --compile-bytecode --no-deps $(SGLANG)
	@touch $@

.venv/.system:
	@ldconfig -p | grep -q libibverbs.so.1 || \
	  if [ "$$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -y -qq libibverbs1 >/dev/null; \
	  elif sudo -n true 2>/dev/null; then sudo apt-get update -qq && sudo apt-get install -y -qq libibverbs1 >/dev/null; \
	  else echo "error: Mooncake needs the system library libibverbs1; run: sudo apt-get install -y libibverbs1" >&2; exit 1; fi
	@mkdir -p .venv && touch $@

# Tests of the page run in Chromium, those of alerts in Prometheus, which starts as a service where it is installed and so
# is installed in CI only. Where they cannot be had, these tests are skipped, and say so.
tools:
	@wanted=; has() { command -v "$$1" >/dev/null; }; \
	  has chromium || has chromium-browser || wanted="chromium fonts-liberation"; \
	  test -z "$$CI" || has prometheus || wanted="$$wanted prometheus"; \
	  test -n "$$wanted" || exit 0; \
	  if [ "$$(id -u)" = 0 ]; then sudo=; elif sudo -n true 2>/dev/null; then sudo=sudo; else sudo=none; fi; \
	  if [ "$$sudo" != none ] && has apt-get; then \
	    echo "installing for the tests: $$wanted"; \
	    { $$sudo apt-get update -qq && $$sudo env DEBIAN_FRONTEND=noninteractive \
	      apt-get install -y -qq --no-install-recommends $$wanted; } >/dev/null 2>&1; \
	  fi; \
	  has chromium || has chromium-browser || echo "note: no Chromium here, so the tests of the page are skipped"

clean:
	rm -rf .venv
