# Everything lives in .venv; `make up` and `make test` set it up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A GPU machine has its own torch: make install CONSTRAINTS= EXTRAS=gpu,test
CONSTRAINTS ?= -c constraints.txt
EXTRAS ?= test

.PHONY: up test install lint format bench-engine bench-gateway bench-batching clean

up: install
	$(BIN)/signalbox up

test: lint
	$(BIN)/signalbox models pull smollm2-135m-instruct
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	$(BIN)/python -m replicas.engine.native
	touch $@

bench-gateway: install
	$(BIN)/python -m load.bench_gateway

clean:
	rm -rf $(VENV) .peers .mypy_cache .ruff_cache .pytest_cache .hypothesis
