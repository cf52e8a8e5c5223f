# Everything one does in a checkout. `make help` lists it.
PYTHON ?= python3
MODEL ?=
WORKERS ?=
BACKEND ?=
QUANTIZATION ?=
RUNTIME ?=
NAME ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
SOAK_ARGS ?=

BIN := $(CURDIR)/.venv/bin
LOCAL := $(BIN)/python -m deploy.local
IF_MADE = [ -x "$(BIN)/python" ] || { echo "No cluster runs here; make up starts one."; exit 0; };
export PYTHONDONTWRITEBYTECODE := 1

# CUDA's Python packages ask an older driver for functions it lacks, which is no error.
OUR_KERNELS := embedding rms_norm silu_mul qkv_epilogue attention matvec apply_plan prepare_tokens plan_decode count_tokens \
    process_logits choose commit logprobs
SANITIZE := --report-api-errors no --error-exitcode 1
KERNEL_TESTS := tests/gpu/test_gpu_sampling.py tests/gpu/test_gpu_truncation.py tests/gpu/test_gpu_layers.py \
    tests/gpu/test_gpu_attention.py tests/gpu/test_gpu_shared_prefix.py

.DEFAULT_GOAL := help
.PHONY: help up down logs ps worker env dev client test test-gpu test-gpu-sanitize test-clients soak lint protos protos-check bench clean

help: ## this list
	@echo "Octavo: an LLM server of gRPC microservices. Targets:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 26
	@echo "Settings: MODEL=smollm2|ORG/NAME|DIRECTORY|mock  WORKERS=1  BACKEND=torch|cuda|mock  QUANTIZATION=int8"
	@echo "          RUNTIME=processes|docker  PYTHON=python3  HF_TOKEN from the environment"

ifeq ($(RUNTIME),docker)
up: client
else
up: env
endif
up: ## start a cluster and wait until it serves (MODEL= WORKERS= BACKEND= QUANTIZATION= RUNTIME=)
	@$(LOCAL) up --model "$(MODEL)" --workers "$(WORKERS)" --backend "$(BACKEND)" --quantization "$(QUANTIZATION)" \
	    --runtime "$(RUNTIME)"

down: ## stop it
	@$(IF_MADE) $(LOCAL) down

logs: ## follow the logs until Ctrl-C (NAME=worker-1 for one process)
	@$(IF_MADE) $(LOCAL) logs --name "$(NAME)"

ps: ## the processes, their addresses and health
	@$(IF_MADE) $(LOCAL) ps

worker: ## add a worker to the running cluster (MODEL= or QUANTIZATION= for another model)
	@$(IF_MADE) $(LOCAL) worker --model "$(MODEL)" --backend "$(BACKEND)" --quantization "$(QUANTIZATION)"

test: dev ## all tests that need no GPU (PYTEST_ARGS=)
	@$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not gpu and not clients" $(PYTEST_ARGS)

test-gpu: dev ## the tests that need a CUDA device; on a machine without one they say so
	@$(BIN)/python -m pytest -m gpu tests/gpu $(PYTEST_ARGS)

test-gpu-sanitize: dev ## the tests of single kernels under compute-sanitizer: memory accesses, then races
	compute-sanitizer --tool memcheck $(SANITIZE) $(addprefix --kernel-name kns=,$(OUR_KERNELS)) $(BIN)/python -m pytest -m gpu $(KERNEL_TESTS)
	compute-sanitizer --tool racecheck $(SANITIZE) $(addprefix --kernel-name kns=,$(OUR_KERNELS) prefill) $(BIN)/python -m pytest -m gpu $(KERNEL_TESTS)

test-clients: dev ## OpenAI's and other clients, each in its own environment, against a cluster (installs them: needs a network once)
	@$(BIN)/python -m tests.clients.environments
	@$(BIN)/python -m pytest -m clients tests/clients $(PYTEST_ARGS)

soak: env ## 20 minutes of mixed load on a cluster of its own; memory, files, tasks and blocks end where they started (SOAK_ARGS=)
	@$(BIN)/python -m deploy.soak $(SOAK_ARGS)

lint: dev ## ruff, mypy and buf
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint protos

protos: dev ## generate the stubs beside the .proto files
	PYTHON="$(BIN)/python" protos/gen.sh

protos-check: dev ## fail where the committed stubs are not those of the .proto files
	@scratch="$$(mktemp -d)" && trap 'rm -rf "$$scratch"' EXIT && cp -R protos/. "$$scratch" \
	    && find "$$scratch" -name '*_pb2*' -delete && PYTHON="$(BIN)/python" "$$scratch/gen.sh" \
	    && diff -r -x __pycache__ protos "$$scratch" && echo "stubs: as generated"

bench: env ## measure the running cluster (BENCH_ARGS=)
	@$(BIN)/octavo bench $(BENCH_ARGS)

env: ## the Python environment .venv of the services and the client
	@$(PYTHON) -m deploy.environment local

dev: # what tests and checks need besides
	@$(PYTHON) -m deploy.environment dev

client: # without the services: they run in containers
	@$(PYTHON) -m deploy.environment client

clean: ## stop the cluster, remove state and caches (.venv and models stay)
	@if [ -x "$(BIN)/python" ] && [ -d .run ]; then $(LOCAL) down; fi
	rm -rf .run .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
