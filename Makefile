# Everything a clone needs. Each target does the set-up that it needs; a second run skips what is there.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo sandbox-up sandbox-down sandbox-status sandbox-logs image test check bench devsh clean setup

help: ## (this list)
	@echo "make <target>:"
	@grep -E '^[a-z-]+:.*## [^(]' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1|\2/' | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'

# The environment is made again only when what it is made from has changed.
$(READY): pyproject.toml constraints.txt tools/make_venv.sh
	@PYTHON="$(PYTHON)" tools/make_venv.sh $(VENV)
	@touch $@

# Engine, base image, image: the command says in one line each what it does, and skips what is there.
setup: $(READY)
	@$(BIN)/rlm-sandbox setup

demo: $(READY) ## An RLM reads all of DSPy's source through the sandbox (no key needed)
	@$(BIN)/rlm-sandbox demo

sandbox-up: $(READY) ## Start the named sandbox daemon and say what to type next
	@$(BIN)/rlm-sandbox up

sandbox-down: $(READY) ## Stop the named sandbox and remove all of it
	@$(BIN)/rlm-sandbox down

sandbox-status: $(READY) ## What is running, since when, with how many sessions
	@$(BIN)/rlm-sandbox status

sandbox-logs: $(READY) ## The sandbox's structured logs
	@$(BIN)/rlm-sandbox logs

image: $(READY) ## Build the sandbox image if its sources changed
	@$(BIN)/rlm-sandbox image

test: setup ## All tests, under DSPy 3.1 to 3.4, with coverage
	@$(BIN)/python -m tests.run

check: $(READY) ## Format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# AGAINST=PATH measures another checkout in the same run; BENCH='--quick --only warm,tool' passes options on.
bench: setup ## Compare with no sandbox, Deno and llm-sandbox; write docs/performance.md
	@for extra in bench bench-deno bench-llm-sandbox; do \
		$(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt -e ".[$$extra]" </dev/null || \
		echo "[set-up] bench: .[$$extra] could not be installed; what needs it is left out, by name"; done
	@$(BIN)/python -m benchmarks $(if $(AGAINST),--against "$(AGAINST)") $(BENCH)

devsh: $(READY) ## A shell inside a sandbox container
	@$(BIN)/rlm-sandbox devsh

clean: ## Remove our containers, images, environments and caches
	@if [ -x $(BIN)/rlm-sandbox ]; then $(BIN)/rlm-sandbox clean || true; fi
	@echo "[clean] removing $(VENV) .venvs and tool caches"
	@rm -rf $(VENV) .venvs .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.* htmlcov build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
