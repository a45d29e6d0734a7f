# make demo   train, evaluate and predict on phantom CT (minutes, CPU)
# make test   lint and tests
# make lint   lint alone; make test-slow: tests of minutes; make clean: environments and caches away
# make test-tpu   the real steps compiled for a TPU, without one (installs its compiler)
# make parity the same weights in PyTorch and here (installs torch)
# make bench  encoder and training step beside PyTorch's, then the input pipeline (installs torch)
# make bench-paper  the paper's comparison on the phantom (weeks on two cores; ARGS takes a part, and
#             it goes on where it stopped)
# make bench-labels  how few labels suffice on the phantom (hours, CPU; goes on where it stopped)
# Each sets up .venv with what it needs, test-tpu .venv-tpu.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
INSTALL := -m pip install --quiet -c requirements/tested.txt

# Two cores serve two test files; a file stays with one process, and so do its fixtures.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder

# One arena: without it glibc keeps freed memory per thread, and both speed and memory suffer.
export MALLOC_ARENA_MAX ?= 1

.PHONY: demo test test-slow test-tpu parity bench bench-paper bench-labels lint clean

# And the small models' steps take a tenth less time where freed memory is kept for the next one.
demo bench-paper bench-labels: export MALLOC_MMAP_MAX_ ?= 0
demo bench-paper bench-labels: export MALLOC_TRIM_THRESHOLD_ ?= 17179869184

demo: $(VENV)/core
	$(BIN)/python -m sammix_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

# Tests compile more than they run.
test parity: export JAX_DISABLE_MOST_OPTIMIZATIONS ?= 1
test: $(VENV)/dev lint
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-tpu: $(VENV)-tpu/tpu
	$(VENV)-tpu/bin/python -m pytest tests/test_plan.py -k tpu

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -m slow

parity: $(VENV)/parity
	$(BIN)/python -m pytest -m torch $(PARALLEL) tests

bench: $(VENV)/parity
	$(BIN)/python -m benchmarks.speed.encoder --rounds 2 --repeats 3
	$(BIN)/python -m benchmarks.speed.train_step --rounds 2 --repeats 3
	$(BIN)/python -m benchmarks.speed.input_pipeline

bench-paper: $(VENV)/core
	$(BIN)/python -m benchmarks.accuracy.paper --workdir=runs/paper $(ARGS)

bench-labels: $(VENV)/core
	$(BIN)/python -m benchmarks.accuracy.labels --workdir=runs/labels

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(VENV)-* .jax_cache .pytest_cache .ruff_cache

# A stamp newer than the requirements says that they are installed.
$(VENV)/core: requirements.txt requirements/tested.txt | $(VENV)/bin/python
	$(BIN)/python $(INSTALL) -r requirements.txt
	touch $@

$(VENV)/dev: requirements.txt requirements/dev.txt requirements/tested.txt | $(VENV)/bin/python
	$(BIN)/python $(INSTALL) -r requirements/dev.txt
	touch $@

$(VENV)/parity: requirements.txt requirements/dev.txt requirements/convert.txt requirements/parity.txt requirements/tested.txt | $(VENV)/bin/python
	$(BIN)/python $(INSTALL) -r requirements/parity.txt
	touch $@

# An environment of its own: beside libtpu, JAX would look for a TPU in every program.
$(VENV)-tpu/tpu: requirements.txt requirements/dev.txt requirements/tpu.txt requirements/cloud.txt requirements/tested.txt | $(VENV)-tpu/bin/python
	$(VENV)-tpu/bin/python $(INSTALL) -r requirements/dev.txt -r requirements/tpu.txt
	touch $@

%/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is older: make demo PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $*
