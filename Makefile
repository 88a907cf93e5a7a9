# Everything is installed into .venv, at the versions of constraints.txt, the first time a target
# needs it; a stamp in .venv/.stamps then records it. Only an edit of pyproject.toml or
# constraints.txt makes a target install again.

PYTHON ?= python3
KERAS_BACKEND ?= jax
PYTEST_ARGS ?=
BENCH_ARGS ?=
MATRIX_ARGS ?=
LIBRARIES_ARGS ?=
FUZZ_TESTS := tests/test_fuzz.py tests/test_killed_training.py
# Two test processes with one thread each: two threads in each of two processes wait for each other.
TEST_JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(TEST_JOBS)

BACKENDS := jax tensorflow torch
STAMPS := .venv/.stamps
PY := .venv/bin/python

# What each stamp stands for. tensorflow-cpu is TensorFlow without 2 GB of CUDA.
INSTALL_jax := jax
INSTALL_tensorflow := tensorflow-cpu
INSTALL_torch := torch
INSTALL_demo := -e '.[demo]'
INSTALL_test := -e '.[test]'
INSTALL_lint := -e '.[lint]'
INSTALL_notebooks := -e '.[notebooks]'
INSTALL_bench := -e . -r benchmarks/requirements.txt
INSTALL_docs := -e '.[docs]'
INSTALL_dist := -e '.[dist]'

# TensorFlow greets on stderr at every import; errors still show.
export TF_CPP_MIN_LOG_LEVEL ?= 3
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
# Material advertises its successor at every build.
export NO_MKDOCS_2_WARNING ?= 1

.DEFAULT_GOAL := help
# Two pips must not write to one environment.
.NOTPARALLEL:
.PHONY: help demo test test-long $(BACKENDS:%=test-%) test-matrix test-libraries fuzz bench bench-training notebooks docs \
    docs-serve dist lint format clean backend-is-known

# $(call under_each_backend,COMMAND) runs it under one after the other, tells how each ended, and fails if one failed.
define under_each_backend
@trap 'exit 130' INT; failed=; \
for backend in $(BACKENDS); do \
  echo "== KERAS_BACKEND=$$backend"; \
  KERAS_BACKEND=$$backend $(1) || failed="$$failed $$backend"; \
done; \
for backend in $(BACKENDS); do \
  case " $$failed " in *" $$backend "*) echo "$$backend: FAILED";; *) echo "$$backend: ok";; esac; \
done; \
test -z "$$failed"
endef

help:  ## list the targets
	@echo "Usage: make TARGET [KERAS_BACKEND=jax|tensorflow|torch] [PYTHON=python3.12] [PYTEST_ARGS=...]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) \
	  | awk -F'|' '{ printf "%-21s %s\n", $$1, $$2 }'
	@echo "  test-jax, test-tensorflow, test-torch: run all tests under one backend"

demo: backend-is-known $(STAMPS)/demo $(STAMPS)/$(KERAS_BACKEND)  ## train on real digits, save, load, go on; writes digits.png
	KERAS_BACKEND=$(KERAS_BACKEND) $(PY) examples/digits.py

test: $(BACKENDS:%=$(STAMPS)/%) $(STAMPS)/test  ## run the tests that show all features, under each backend, in turn
	$(call under_each_backend,$(PYTEST) -m "not long" $(PYTEST_ARGS))

test-long: $(BACKENDS:%=$(STAMPS)/%) $(STAMPS)/test  ## run the tests that make test leaves out
	$(call under_each_backend,$(PYTEST) -m long $(PYTEST_ARGS))

# All three backends are installed here too: a test may save under one and load under another, or
# compare with a framework's own optimizer.
$(BACKENDS:%=test-%): test-%: $(BACKENDS:%=$(STAMPS)/%) $(STAMPS)/test
	KERAS_BACKEND=$* $(PYTEST) $(PYTEST_ARGS)

# `make test-matrix MATRIX_ARGS="--rows newest"` runs one row; tests/matrix.py holds them.
test-matrix:  ## run the tests over versions of Keras and Python, in .matrix/; writes docs/versions.md
	$(PYTHON) tests/matrix.py $(MATRIX_ARGS)

# `make test-libraries LIBRARIES_ARGS="--backends jax --only keras_hub"` runs some; the page's blocks are the tests.
test-libraries:  ## run docs/guides/other_libraries.md beside keras-hub and others, in .matrix/
	$(PYTHON) tests/libraries.py $(LIBRARIES_ARGS)

# Other examples at each run; one that fails is printed with what reproduces it.
FUZZ_EXAMPLES ?= 2000
fuzz: $(BACKENDS:%=$(STAMPS)/%) $(STAMPS)/test  ## random options, gradients and operations against a NumPy model, at length
	$(call under_each_backend,FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) OMP_NUM_THREADS=1 $(PY) -m pytest \
	  --hypothesis-show-statistics $(FUZZ_TESTS) $(PYTEST_ARGS))

# Keep the machine idle meanwhile. `make bench BENCH_ARGS=--quick` shows in a minute that all works.
bench: $(BACKENDS:%=$(STAMPS)/%) $(STAMPS)/bench  ## time a step beside other optimizers; writes benchmarks/results.md
	@set -e; trap 'exit 130' INT; for backend in $(BACKENDS); do \
	  KERAS_BACKEND=$$backend $(PY) benchmarks/run.py --out benchmarks/results-$$backend.json $(BENCH_ARGS); \
	done
	$(PY) benchmarks/report.py
	$(PY) benchmarks/starting.py $(filter --quick,$(BENCH_ARGS))
	$(PY) benchmarks/sharding.py

# About an hour: models trained with five seeds, and the memory and time of a step.
bench-training: $(BACKENDS:%=$(STAMPS)/%) $(STAMPS)/bench  ## train in 16 and 8 bits; writes benchmarks/training.md, state.md
	@set -e; trap 'exit 130' INT; for backend in $(BACKENDS); do \
	  rm -f benchmarks/training-$$backend.json benchmarks/state-$$backend.json; \
	  KERAS_BACKEND=$$backend $(PY) benchmarks/training.py; \
	  KERAS_BACKEND=$$backend $(PY) benchmarks/state.py; \
	done
	$(PY) benchmarks/training.py --report
	$(PY) benchmarks/state.py --report

# PyTorch besides the backend: a run is taken over from it.
notebooks: backend-is-known $(STAMPS)/notebooks $(STAMPS)/$(KERAS_BACKEND) $(STAMPS)/torch  ## execute the notebooks in place
	OMP_NUM_THREADS=1 KERAS_BACKEND=$(KERAS_BACKEND) $(PY) notebooks/run.py

docs: $(STAMPS)/docs  ## build the site into site/, strictly: a dead link or a bad docstring fails
	$(PY) -m mkdocs build --strict --quiet
	$(PY) .ci/links.py site

docs-serve: $(STAMPS)/docs  ## serve the site on port 8000, built anew at each change
	$(PY) -m mkdocs serve

dist: $(STAMPS)/dist  ## build wheel and sdist into dist/, and check what an index would check
	rm -rf dist
	$(PY) -m build --no-isolation
	$(PY) -m twine check --strict dist/*

lint: $(STAMPS)/lint  ## check format, style and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: $(STAMPS)/lint  ## format and sort imports
	$(PY) -m ruff check --select I --fix .
	$(PY) -m ruff format .

clean:  ## remove .venv and everything else that these targets made
	rm -rf .venv .matrix .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site
	rm -f digits.keras digits.png continue_from_pytorch.png
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

backend-is-known:
	@case "$(KERAS_BACKEND)" in jax|tensorflow|torch) ;; \
	  *) echo "KERAS_BACKEND must be jax, tensorflow or torch. Received: KERAS_BACKEND=$(KERAS_BACKEND)" >&2; \
	     exit 2;; esac

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "keras_adam needs Python 3.11 or newer; name one with make PYTHON=python3.12. Received:" \
	    "PYTHON=$(PYTHON) ($$($(PYTHON) --version 2>&1))" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	@mkdir -p $(STAMPS) && touch $@

$(BACKENDS:%=$(STAMPS)/%) $(STAMPS)/demo $(STAMPS)/test $(STAMPS)/lint $(STAMPS)/bench $(STAMPS)/notebooks \
    $(STAMPS)/docs $(STAMPS)/dist: \
    $(STAMPS)/%: $(STAMPS)/venv pyproject.toml constraints.txt
	$(PY) -m pip install -c constraints.txt $(INSTALL_$*)
	@touch $@
