# make demo    the whole system on real data: VAE, SFT, GRPO, evaluation (about half an hour on two cores)
# make test    every test, with one tiny run of the whole loop
# make test-faults   whole runs disturbed on purpose, and a step of every shipped config
# make setup   what both need, in .venv; quick when it is there
# make judge-env  the judge's own environment, .venv-judge: vLLM for GPUs where there are any, else for CPUs
# make study   the demo with two more seeds, after a demo; forty minutes on two cores
# make sweep   the demo's policy trained again under many settings; hours on two cores, goes on where it stopped
# make bench   ratios of speed against baselines, after a demo
# make base    trains the policy that the demo starts from; hours on two cores, goes on where it stopped
# make soak    kills a tiny run at random moments until it finishes
PYTHON ?= python3
VENV := .venv
JUDGE_VENV := .venv-judge
BIN := $(VENV)/bin
PIP_ARGS ?=

.PHONY: setup judge-env demo test test-faults lint types study sweep bench soak base tools clean

setup: $(VENV)/.complete

tools:
	@sh deploy/check-tools.sh $(PYTHON)

# torch comes alone and first: a range that admits a newer release would bring gigabytes of CUDA packages to a CPU machine.
# pymatting and DeepSpeed's operator compile on first use; the last lines keep that out of the first run.
$(VENV)/.complete: pyproject.toml constraints.txt
	@sh deploy/check-tools.sh $(PYTHON)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	$(BIN)/python -c 'import pymatting'
	DS_ACCELERATOR=cpu $(BIN)/python -m actors.operator_cache
	@touch $@

judge-env: $(JUDGE_VENV)/.complete

$(JUDGE_VENV)/.complete: deploy/judge-env.sh
	sh deploy/judge-env.sh $(PYTHON) $(JUDGE_VENV) $(PIP_ARGS)
	@touch $@

demo: setup
	$(BIN)/omnialpha run demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-faults: setup
	$(BIN)/python -m pytest -m 'faults or slow' -n 0

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

study: setup
	$(BIN)/python -m benchmarks.seeds run runs/demo --out runs/seeds
	$(BIN)/python -m benchmarks.seeds table runs/demo --out runs/seeds

sweep: setup
	$(BIN)/python -m benchmarks.study run runs/demo --out runs/study
	$(BIN)/python -m benchmarks.study table --out runs/study

bench: setup
	$(BIN)/python -m benchmarks.group_scorer
	$(BIN)/python -m benchmarks.overlap
	$(BIN)/python -m benchmarks.grpo_step runs/demo
	$(BIN)/python -m benchmarks.sft_throughput runs/demo

base: setup
	$(BIN)/omnialpha rgb demo-base
	$(BIN)/omnialpha vae demo-base
	$(BIN)/omnialpha sft demo-base
	test -d runs/demo-base-first || $(BIN)/omnialpha export runs/demo-base runs/demo-base-first --stage sft
	$(BIN)/omnialpha vae demo-base-more
	$(BIN)/omnialpha sft demo-base-more
	rm -rf policy/shipped/demo-base
	$(BIN)/omnialpha export runs/demo-base-more policy/shipped/demo-base --stage sft --dtype bfloat16

soak: setup
	$(BIN)/python -m pytest -m soak -n 0 -s tests/faults

clean:
	rm -rf $(VENV) $(JUDGE_VENV) runs build *.egg-info .pytest_cache .ruff_cache .mypy_cache
