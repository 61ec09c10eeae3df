# One environment for everything: ./.venv. `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-from-lock
# One thread a test process, and no spinning of idle OpenMP threads: see docs/environment.md.
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

DOCKER ?= docker
COMPOSE ?= $(DOCKER) compose
# e.g. BUILD_ARGS="--build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu" for a worker image without CUDA
BUILD_ARGS ?=

.PHONY: help env run serve stack stack-down stack-test audit deployments report test test-slow test-soak lint lock clean networks

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | column -t -s $$'\t'

env: $(STAMP)  ## Create .venv with the locked versions

$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

run: env  ## The quick start: the whole pipeline on handwritten digits, in minutes
	$(BIN)/repae run

serve: env  ## Prefect, MLflow and a worker on this machine, until Ctrl-C
	$(BIN)/repae serve

stack: .env  ## Everything in containers (docker-compose.yml); secrets go into .env
	DOCKER_BUILDKIT=1 $(DOCKER) build --file infra/Dockerfile --target control --tag repae-control:dev $(BUILD_ARGS) .
	DOCKER_BUILDKIT=1 $(DOCKER) build --file infra/Dockerfile --target worker --tag repae-worker:dev $(BUILD_ARGS) .
	$(COMPOSE) up --detach --no-build --wait --wait-timeout 300
	$(COMPOSE) ps

stack-down:  ## Stop the containers; volumes stay (docker compose down --volumes removes them)
	$(COMPOSE) down

stack-test: env stack  ## Kill services under a pipeline in the stack, compare with a calm run (about 40 minutes)
	$(BIN)/python infra/stack_test.py --compose "$(COMPOSE)"
	$(BIN)/python infra/stack_security.py --compose "$(COMPOSE)"

audit: env  ## Known vulnerabilities of the locked versions (asks the advisory database of the package index)
	test -x $(VENV)-audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)-audit && $(VENV)-audit/bin/pip install --quiet pip-audit; }
	$(VENV)-audit/bin/pip-audit --requirement requirements.lock --no-deps --disable-pip

.env: infra/make_env.py
	python3 infra/make_env.py .env

deployments: env  ## Write prefect.yaml anew from flows/deployments.py
	$(BIN)/python -m flows.deployments > prefect.yaml

report: env  ## Write the report of the latest run again and say where it is
	$(BIN)/repae report

test: env  ## All fast tests
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

test-slow: env  ## The end-to-end tests that take minutes
	$(TEST_ENV) $(BIN)/python -m pytest -m slow -n 2 --max-worker-restart 0 --timeout 1800

test-soak: env  ## Longer repetitions and a browser: many minutes on a machine that does nothing else
	$(TEST_ENV) $(BIN)/python -m pytest -m soak --timeout 1800

lint: env  ## Formatter, linter, types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

networks: env  ## Train the three small digit networks again (minutes)
	OMP_WAIT_POLICY=passive $(BIN)/python -m repae_core.digits.train

lock: env  ## Write the installed versions to requirements.lock
	{ head -n 1 requirements.lock; $(BIN)/pip freeze --all --exclude-editable | grep -v "^pip=="; } > requirements.lock.new
	mv requirements.lock.new requirements.lock

clean:  ## Remove what the quick start made (artifacts, MLflow, Prefect), not the environment
	rm -rf artifacts .repae
