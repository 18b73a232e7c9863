# Everything installs from this file on a machine that has only Python 3.11, pip, make and gcc.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv demo deployment-demo test test-large test-imports test-long test-chaos lint format bench bench-peers clean

help: ## what there is to run
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

# Re-installs only when what is installed would change.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@# torch first and exactly: a looser requirement may bring gigabytes of CUDA.
	@$(BIN)/pip install --quiet --quiet --disable-pip-version-check -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	@$(BIN)/pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,test,dev]'
	@touch $@

venv: $(STAMP) ## make .venv with everything in it

demo: $(STAMP) ## the main job: six sites, real data, consent, person-level privacy
	@$(BIN)/confide simulate

deployment-demo: $(STAMP) ## a coordinator and three sites as processes over TLS, one kill, five sealed rounds: minutes
	@$(BIN)/python -m benchmarks.deployment_demo

test: $(STAMP) ## every test
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

test-large: $(STAMP) ## seal a hundred million parameters: seconds and GiB
	@CONFIDE_LARGE=1 $(BIN)/python -m pytest -q -s -n 0 tests/privacy/sealing/test_streaming.py -k hundred_million

test-imports: $(STAMP) ## ten thousand broken consent files
	@CONFIDE_IMPORTS=1 $(BIN)/python -m pytest -q -n 0 tests/privacy/consent/imports/test_mutations.py

test-long: $(STAMP) ## tests that take long to say what a shorter one says nearly as well: minutes
	@CONFIDE_LONG=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m long

test-chaos: $(STAMP) ## kill every process in every phase, cut networks, fill disks, 200 rounds: tens of minutes
	@CONFIDE_CHAOS=1 $(BIN)/python -m pytest -q -n 0 tests/server/test_killed.py tests/simulations/test_resume.py \
		tests/integration/test_deployment.py tests/integration/test_nothing_is_lost.py tests/integration/test_sites_away.py \
		tests/integration/test_coordinator_memory.py tests/integration/test_runs_at_once.py

lint: $(STAMP) ## ruff, mypy --strict, import-linter
	@$(BIN)/ruff format --check --quiet . || { echo "run: make format"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-cache > $(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log; exit 1; }
	@echo "lint: ok"

format: $(STAMP) ## format the code
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .

bench: $(STAMP) ## measure what the README claims
	@$(BIN)/python -m benchmarks.utility --json

PEERS := .venv-peers
bench-peers: ## environments of the simulators that benchmarks.simulation compares with: a GiB or two
	@test -x $(PEERS)/pfl/bin/python || $(PYTHON) -m venv $(PEERS)/pfl
	@test -x $(PEERS)/flower/bin/python || $(PYTHON) -m venv $(PEERS)/flower
	@$(PEERS)/pfl/bin/pip install --quiet --disable-pip-version-check torch==$$(sed -n 's/^torch==//p' constraints.txt) pfl==0.6.0
	@$(PEERS)/flower/bin/pip install --quiet --disable-pip-version-check torch==$$(sed -n 's/^torch==//p' constraints.txt) "flwr[simulation]==$$(sed -n 's/^flwr==//p' constraints.txt)"

clean: ## remove what is not in git, but for runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
