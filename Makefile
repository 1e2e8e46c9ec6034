# `make up` and `make test` need Python 3.11 or newer and make; everything else they create below .venv.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
LOOP ?= examples/cartpole.yaml

.PHONY: up test install lint tour bench bench-learning clean

up: install            ## train CartPole, gate it, serve it, and stay until Ctrl-C
	$(BIN)/trimtab up $(LOOP)

test: install          ## all tests that fit in CI
	$(BIN)/python -m pytest -m "not slow"

tour: install          ## the whole story: train, serve, canary, promotion, refusal, rollback, replay
	PATH="$(abspath $(BIN)):$$PATH" bash examples/tour.sh

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.bench  ## the benchmarks of speed, one after the other; nothing else may run meanwhile
	$(BIN)/python -m benchmarks.train_cartpole
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.serve_latency
	$(BIN)/python -m benchmarks.serve_batches
	$(BIN)/python -m benchmarks.serve_overheads
	$(BIN)/python -m benchmarks.gates
	$(BIN)/python -m benchmarks.serve_budget
	$(BIN)/python -m benchmarks.serve_swaps
	$(BIN)/python -m benchmarks.serve_overload
	$(BIN)/python -m benchmarks.bundle
	$(BIN)/python -m benchmarks.exports

bench-learning: $(VENV)/.bench  ## how well policies learn, about 40 minutes; `make test` has a quick subset
	$(BIN)/python -m benchmarks.learning

install: $(VENV)/.installed

# pip, not another installer: with the range of torch in pyproject.toml it takes the small CPU wheel where one is offered.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is %s" % sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) .venv-bench build *.egg-info
