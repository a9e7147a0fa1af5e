# Every command of the project, each as one line that a person could type. `make help` lists them.

CONFIG ?= configs/shapes_ssd.yaml
ARGS   ?=
PYTHON ?= python3
IMAGE  ?= onestage
SHM    ?= 8g
GPUS   ?= $(if $(shell command -v nvidia-smi 2>/dev/null),all)

# ONESTAGE_ENV names an environment that is already complete, as in the Docker image: nothing is installed then.
ONESTAGE_ENV ?=
BIN   := $(or $(ONESTAGE_ENV),.venv)/bin
READY := $(if $(ONESTAGE_ENV),,.venv/.ready)

# eval and predict take the newest best checkpoint, which holds its own configuration; a CONFIG that is given comes on top.
CKPT ?= $(shell ls -t runs/*/*/checkpoints/best.ckpt 2>/dev/null | head -n 1)
GIVEN_CONFIG = $(if $(filter-out file,$(origin CONFIG)),--config $(CONFIG))
HAS_CKPT = test -n "$(CKPT)" || { echo 'no runs/*/*/checkpoints/best.ckpt yet: run make train, or name one with CKPT=path' >&2; exit 2; }

.PHONY: help setup train eval predict test test-all lint format types benchmark lock docker docker-train clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## Make .venv and install what requirements.lock pins

# exec, so that a SIGTERM that make passes on ends in the training and not in a shell in between.
train: $(READY) ## Train: make train CONFIG=configs/voc_ssd300.yaml ARGS="--trainer.max_epochs=1"
	exec $(BIN)/onestage fit --config $(CONFIG) $(ARGS)

eval: $(READY) ## Validate the newest best checkpoint, or CKPT=path
	@$(HAS_CKPT)
	exec $(BIN)/onestage validate $(GIVEN_CONFIG) --ckpt_path $(CKPT) $(ARGS)

predict: $(READY) ## Draw detections: make predict ARGS="--data.predict_dir=my/images"
	@$(HAS_CKPT)
	exec $(BIN)/onestage predict $(GIVEN_CONFIG) --ckpt_path $(CKPT) $(ARGS)

test: $(READY) ## Run the tests that take seconds; on more cores: make test ARGS="-n auto"
	$(BIN)/python -m pytest $(ARGS)

test-all: $(READY) ## Run every test, the slow ones too
	$(BIN)/python -m pytest -m "slow or not slow" $(ARGS)

lint: $(READY) ## Check style, formatting and the Dockerfile
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/hadolint Dockerfile

format: $(READY) ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

types: $(READY) ## Check the types of src and scripts
	$(BIN)/mypy

benchmark: $(READY) ## Time one part beside its alternative: make benchmark ARGS=step
	$(BIN)/python scripts/benchmark.py $(ARGS)

# A release is let in when it is a week old: the malicious ones of the past were withdrawn within days.
lock: $(READY) ## Remake requirements.lock from pyproject.toml; to newer versions: make lock ARGS=--upgrade
	$(BIN)/uv pip compile --no-config --quiet --universal --python-version 3.11 --exclude-newer "7 days" \
	  --generate-hashes --no-annotate --no-emit-index-url --custom-compile-command "make lock" \
	  --group dev $(ARGS) --output-file requirements.lock pyproject.toml

docker: ## Build the CUDA image
	docker build --tag $(IMAGE) .

docker-train: export CONFIG := $(CONFIG)
docker-train: export ARGS := $(ARGS)
docker-train: docker ## Train in the image; on the CPU with GPUS=, on one device with GPUS=device=0
	mkdir -p data runs/.tmp
	docker run --rm --init --stop-timeout 120 $$(test -t 0 && echo --interactive --tty) $(if $(GPUS),--gpus $(GPUS)) --shm-size $(SHM) \
	  --cap-drop ALL --security-opt no-new-privileges --user "$$(id -u):$$(id -g)" --env CONFIG --env ARGS \
	  --volume "$(CURDIR)/data:/app/data" --volume "$(CURDIR)/runs:/app/runs" --entrypoint make $(IMAGE) train

clean: ## Remove caches and build output; data, runs and .venv stay
	rm -rf build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

# The mark of an unfinished install stands until the last step, so that one that was cut off is begun again.
.venv/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo '$(PYTHON) is not Python 3.11 or newer with venv; name one that is: make setup PYTHON=python3.12' >&2; exit 2; }
	@if [ -e .venv/.unfinished ]; then rm -rf .venv; fi
	@mkdir -p .venv && touch .venv/.unfinished
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --require-hashes --no-deps --only-binary :all: -r requirements.lock
	.venv/bin/python -m pip install --no-deps --no-build-isolation -e .
	@rm .venv/.unfinished && touch $@
