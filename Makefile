# Everything a user runs. Variables reach Python through the environment, never through a recipe line,
# so that quotes, $ and ; in ARGS stay text.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
VARIABLES := NAME NAMES ARGS SEEDS BASELINE JOBS REQUEST K FORMAT OUT GPUS NODES TASKS TIME LEAD DRY COST \
    MEMORY SPACE N SLURM PUBLISH HISTORY ITEMS EXCLUDE RETRIEVER PORT LIMITS USERS VOCABULARY BESIDE PAPER \
    SIZE TABLE RUN SLOW CHAIN BATCH ENCODER
$(foreach name,$(VARIABLES),$(eval override $(name) := $$(value $(name))))
export $(VARIABLES)
# Shells have a USER of their own, and compilers a HOST: only those of the command line are meant.
ifeq ($(origin USER),command line)
export LLMREC_USER := $(value USER)
override USER := $(value USER)
endif
ifeq ($(origin HOST),command line)
export LLMREC_HOST := $(value HOST)
override HOST := $(value HOST)
endif

PY := $(VENV)/bin/python
READY := $(VENV)/.ready
DEMO := .venv-demo

# A variable that nothing reads is a slip of the hand: EXLUDE=50 would leave nothing out, and say nothing.
KNOWN := $(VARIABLES) USER HOST PYTHON VENV PY READY DEMO PEERS SHELL MAKEFLAGS
STRANGE := $(strip $(foreach name,$(filter-out $(KNOWN),$(.VARIABLES)),$(if $(filter command,$(firstword $(origin $(name)))),$(name))))
ifneq ($(STRANGE),)
$(error nothing reads $(STRANGE): the variables are USER HOST $(VARIABLES))
endif

.PHONY: help exp slurm sweep plan show data prepare images export recommend serve list results compare beyond plots verify crossover test lint format clean bench bench-data bench-evaluation bench-peers env report dashboard preferences hallucinations demo table replay

help: ## Show this list
	@echo "usage: make TARGET NAME=group/experiment [ARGS=\"key=value ...\"]"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'
	@echo "over several seeds, with paired tests: make exp NAME=... SEEDS=5 (or 0,3,7) [BASELINE=popularity or group/experiment]"
	@echo "start with:  make exp NAME=sasrec/movielens_100k"

exp: $(READY) ## Run an experiment: do what is missing, resume what was cut off, print its table
	@$(PY) -m experiments.run exp

slurm: $(READY) ## Submit an experiment to a Slurm cluster: GPUS=2 NODES=2 TIME=12:00:00 SEEDS=5 CHAIN=1 (a job a stage; DRY=1 prints)
	@$(PY) -m experiments.slurm

replay: $(READY) ## A step whose loss was no number, computed again: where it begins (BATCH=runs/.../nonfinite.0.safetensors)
	@$(PY) -m experiments.replay

sweep: $(READY) ## Try many values of an experiment's settings: SPACE=experiments/sweeps/x.yaml N=50 JOBS=4 (SLURM=1: an array)
	@$(PY) -m experiments.sweep

plan: $(READY) ## Say which stages are done, missing or stale, and why (COST=1: what the missing ones take, from a few steps)
	@$(PY) -m experiments.run plan

show: $(READY) ## Print the resolved configuration and where each value came from
	@$(PY) -m experiments.run show

data: $(READY) ## Prepare the experiment's data and print the data report
	@$(PY) -m experiments.run data

prepare: $(READY) ## Prepare many categories, JOBS at a time or a share a Slurm array task (ARGS="data.category=all")
	@$(PY) -m experiments.prepare

images: $(READY) ## Download the item images of an experiment's data
	@$(PY) -m experiments.images

export: $(READY) ## Write finished models with a card: ONNX and safetensors, or a PEFT adapter and plain weights with it merged in
	@$(PY) -m experiments.export

recommend: $(READY) ## What a finished experiment would show USER=<id> or HISTORY="title; title" next (K=10, EXCLUDE=, ITEMS=new.jsonl, REQUEST="in words", FORMAT=json)
	@$(PY) -m experiments.recommend

serve: $(READY) ## Answer over HTTP with a finished experiment until Ctrl-C (HOST=127.0.0.1, PORT=8000, LIMITS="seconds=120 batch=64")
	@$(PY) -m experiments.serve

demo: $(READY) $(DEMO)/.ready ## A page in the browser to ask a finished experiment on (BESIDE="another one", HOST=127.0.0.1, PORT=7860)
	@$(PY) -m experiments.demo

# Gradio 6.31 takes no Pillow 13, and Pillow 12.3 scales pictures to other pixels, so that a model would see other ones:
# the page has an environment of its own, and asks the model's process.
$(DEMO)/.ready: constraints.txt
	@echo "creating $(DEMO) for the page (about 300 MB, once)"
	@test -x $(DEMO)/bin/python || $(PYTHON) -m venv $(DEMO)
	@sed '/^pillow==/d' constraints.txt > $(DEMO)/constraints.txt
	@$(DEMO)/bin/python -m pip install --quiet --disable-pip-version-check -c $(DEMO)/constraints.txt gradio "pillow==12.3.0"
	@touch $@

list: $(READY) ## List every experiment with its one-line header
	@$(PY) -m experiments.run list

results: $(READY) ## All finished runs in tables, one for each protocol (PUBLISH=1 rewrites experiments/results.md and the README's)
	@$(PY) -m experiments.run results

compare: $(READY) ## Finished experiments in one table, with paired tests and costs (NAMES="a b", FORMAT=markdown|latex|csv, OUT=FILE)
	@$(PY) -m experiments.compare

beyond: $(READY) ## What the lists of finished experiments are like: coverage, Gini, novelty, diversity, gaps (NAMES="a b")
	@$(PY) -m experiments.compare beyond

plots: $(READY) ## Charts of finished experiments, SVG and PNG (NAMES="a b", OUT=FOLDER)
	@$(PY) -m experiments.plots

report: $(READY) ## One HTML page of finished experiments, from run folders, without an account (NAME=..., NAMES="a b", OUT=FILE)
	@$(PY) -m experiments.page

dashboard: $(READY) ## The project's W&B workspace as code (PUBLISH=1 sends it, with an account)
	@$(PY) -m experiments.dashboard

# A test takes one thread and, at most, some 2 GB: four at once fit a laptop. What is given in ARGS comes later and wins.
# Tests marked slow run with SLOW=1, as in .ci/run, and where ARGS picks them.
test: $(READY) ## Run the tests, a file on each core (SLOW=1: those over 20 s, too; ARGS="-k name" picks some, ARGS="-n 0 --pdb" runs one at a time)
	@$(PY) -c 'import os, shlex, sys, pytest; own = shlex.split(os.environ["ARGS"]); fast = [] if own or os.environ["SLOW"] not in ("", "0") else ["-m", "not slow"]; sys.exit(pytest.main(["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder", *fast, *own]))'

verify: $(READY) ## Compare the newest runs of NAME with published numbers (no NAME: write experiments/REPRODUCTION.md)
	@$(PY) -m experiments.run verify

table: $(READY) ## A paper's tables: its number, ours, the difference (PAPER=a_llmrec, SIZE=cpu|paper, RUN=1 or SLURM=1 does what is missing)
	@$(PY) -m experiments.paper_table

crossover: $(READY) ## Table and plot of a finished run's hit@1 by the target's training count (BASELINE=row)
	@$(PY) -m experiments.run crossover

preferences: $(READY) ## A page and a sheet of users: histories in pictures, what was written of them, answers (USERS=10, OUT=FOLDER)
	@$(PY) -m experiments.preferences

hallucinations: $(READY) ## How much of what a finished run's texts state nothing supports (VOCABULARY=FILE)
	@$(PY) -m experiments.hallucinations

lint: $(READY) ## ruff, mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: $(READY) ## Format the code
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: $(READY) ## Compare our SASRec with the peers of `make bench-peers`, side by side
	@$(PY) -m tests.benchmarks.bench_sequential $${ARGS:-}

bench-data: $(READY) ## Measure parsing, filtering and loading against the usual pandas route (needs bench-peers)
	@$(PY) tests/benchmarks/bench_data.py $${ARGS:-}

bench-evaluation: $(READY) ## Measure full ranking of 200,000 users x 1,000,000 items (ARGS=--full for all of them)
	@$(PY) -m tests.benchmarks.bench_evaluation $${ARGS:-}

# RecBole 1.2.1 needs ray 2.6 (so Python 3.11 at most), numpy 1, and pkg_resources, which setuptools dropped in 82.
PEERS := .venv-peers
PEER_rectools := "rectools[torch]==0.19.0" "numpy==1.26.4"
PEER_replay := "replay-rec[torch]==0.22.0" "lightning==2.6.6"
PEER_recbole := "recbole==1.2.1" "setuptools<81" "numpy<2" "pandas<2.3"
bench-peers: $(PEERS)/rectools/.ready $(PEERS)/replay/.ready $(PEERS)/recbole/.ready ## Install the systems that `make bench` compares with, each in an environment of its own
$(PEERS)/%/.ready:
	@test -x $(PEERS)/$*/bin/python || $(PYTHON) -m venv $(PEERS)/$*
	@$(PEERS)/$*/bin/python -m pip install --disable-pip-version-check "torch==2.13.0" $(PEER_$*)
	@touch $@

clean: ## Remove caches and build leftovers (runs/, .venv and the data cache stay)
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

env: $(READY) ## Create the environment only

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] + ": run make PYTHON=/path/to/python3.11 ...") if sys.version_info < (3, 10) else None'
	@echo "creating $(VENV) (about 2 GB, a few minutes the first time)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
