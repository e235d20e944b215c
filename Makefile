# Every target sets up .venv first when that is needed. PYTEST_FLAGS narrows a test run:
#   make test PYTEST_FLAGS="tests/objectives -x"
PYTHON_IN_VENV := .venv/bin/python
# Multi-rank tests start several processes each, so more workers than this would only wait for each other.
PYTEST_FLAGS ?= --numprocesses=auto --maxprocesses=4 --dist=worksteal
# What to compare, and how: make bench BENCH_FLAGS="longred_step --repeats 3"
BENCH_FLAGS ?=
SHELL_SCRIPTS := .ci/run $(wildcard docker/*.sh tests/docker/*.sh tools/*.sh tools/launch/*.sh tools/launch/*.sbatch)

.DEFAULT_GOAL := help
.PHONY: help setup test coverage lint format demo layouts plan-check gpu-check bench chaos hostile docker-check study-longred study-packed tiny-base clean

help: ## this list
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

setup: ## .venv in this folder with everything in it (first time: about 5 minutes, 6 GB)
	@sh tools/setup.sh

test: setup ## every test
	$(PYTHON_IN_VENV) -m pytest $(PYTEST_FLAGS)

coverage: setup ## every test, and the lines of longred_megatron that none of them runs
	$(PYTHON_IN_VENV) -m pytest $(PYTEST_FLAGS) --cov=longred_megatron

lint: setup ## what CI checks besides the tests: ruff, mypy, shellcheck, hadolint
	@failed=0; \
	$(PYTHON_IN_VENV) -m ruff check . || failed=1; \
	$(PYTHON_IN_VENV) -m ruff format --check . || failed=1; \
	$(PYTHON_IN_VENV) -m mypy || failed=1; \
	.venv/bin/shellcheck --external-sources $(SHELL_SCRIPTS) || failed=1; \
	.venv/bin/hadolint docker/Dockerfile.* || failed=1; \
	exit $$failed

format: setup ## rewrites the code in the project's format
	$(PYTHON_IN_VENV) -m ruff check --fix .
	$(PYTHON_IN_VENV) -m ruff format .

demo: setup ## the main job on the CPU, small and real
	$(PYTHON_IN_VENV) tools/demo.py

layouts: setup ## the table of layouts against one process, up to 8 ranks (5 minutes)
	LONGRED_DEVICE=cpu $(PYTHON_IN_VENV) -m tests.layouts.table

plan-check: setup ## the planner's memory beside real steps on this CPU, 31 layouts up to 8 ranks (5 minutes)
	LONGRED_DEVICE=cpu $(PYTHON_IN_VENV) -m tests.planning.measure

gpu-check: setup ## models of the GPU path constructed with the compiled Transformer Engine, where it is installed
	LONGRED_TE=compiled $(PYTHON_IN_VENV) -m pytest tests/gpu_path -n0

bench: setup ## speed and memory beside plain transformers, Megatron-Core, eager torch and the disk (hours on a CPU)
	$(PYTHON_IN_VENV) tools/bench.py --output build/bench $(BENCH_FLAGS)

chaos: setup ## kills a run 20 times at random; it must end with the same bits (7 minutes)
	LONGRED_DEVICE=cpu $(PYTHON_IN_VENV) -m tests.chaos

hostile: setup ## every command on damaged, insane and malicious input, by class (5 minutes)
	LONGRED_DEVICE=cpu $(PYTHON_IN_VENV) -m tests.hostile

docker-check: setup ## builds the CPU image and runs it; the variables in tests/docker/test_images.py name bases (10 minutes)
	LONGRED_DOCKER_BASE=$${LONGRED_DOCKER_BASE-python:3.12-slim} $(PYTHON_IN_VENV) -m pytest --capture=no tests/docker

study-longred: setup ## LongReD's comparisons with a tiny model, 3 seeds each; goes on where it was stopped (an hour)
	$(PYTHON_IN_VENV) tools/tiny_runs.py
	$(PYTHON_IN_VENV) tools/study.py recipes/studies/tiny_longred.yaml

study-packed: setup ## logit distillation from packed short texts against cross-entropy, 3 seeds each; goes on (5 hours)
	$(PYTHON_IN_VENV) tools/tiny_runs.py
	$(PYTHON_IN_VENV) tools/make_tiny_base.py --hidden-size 256
	$(PYTHON_IN_VENV) tools/make_tiny_base.py --seed 7
	$(PYTHON_IN_VENV) tools/study.py recipes/studies/tiny_packed.yaml

tiny-base: setup ## makes the demo's base model again, from texts alone (half an hour)
	$(PYTHON_IN_VENV) tools/make_tiny_base.py

clean: ## removes caches and build outputs; keeps .venv, runs, models and texts
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find longred_megatron tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
