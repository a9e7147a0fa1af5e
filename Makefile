# Every command of the project. `make help` lists them.

CONFIG ?= configs/shapes_ssd.yaml
DATA   ?=
ARGS   ?=
PYTHON ?= python3
IMAGE  ?= onestage
GPUS   ?= $(if $(shell command -v nvidia-smi 2>/dev/null),all)

# ONESTAGE_ENV names a complete environment, as in the Docker image; nothing is installed then.
ONESTAGE_ENV ?=
BIN   := $(or $(ONESTAGE_ENV),.venv)/bin
READY := $(if $(ONESTAGE_ENV),,.venv/.ready)

# eval and predict use the newest best checkpoint, which holds its configuration; an explicit CONFIG overrides it.
CKPT     ?= $(shell ls -t runs/*/*/checkpoints/best.ckpt 2>/dev/null | head -n 1)
HAS_CKPT  = test -n "$(CKPT)" || { echo 'no runs/*/*/checkpoints/best.ckpt: run make train, or set CKPT=path' >&2; exit 2; }
OPTIONS   = $(if $(filter-out file,$(origin CONFIG)),--config $(CONFIG)) --ckpt_path '$(CKPT)' $(if $(DATA),--data.path '$(DATA)') $(ARGS)

.PHONY: help setup train eval predict test test-all lint format types benchmark lock docker docker-train clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## Create .venv and install requirements.lock

train: $(READY) ## Train: make train, make train DATA=my/data, make train CONFIG=configs/voc_ssd300.yaml
	exec $(BIN)/onestage fit --config $(CONFIG) $(if $(DATA),--data.path '$(DATA)') $(ARGS)

eval: $(READY) ## Evaluate the newest best checkpoint, or CKPT=path
	@$(HAS_CKPT)
	exec $(BIN)/onestage validate $(OPTIONS)

predict: $(READY) ## Draw detections: make predict ARGS="--data.predict_dir=my/images"
	@$(HAS_CKPT)
	exec $(BIN)/onestage predict $(OPTIONS)

test: $(READY) ## Run the quick tests, a process per core; one file: make test ARGS=tests/boxes/test_nms.py
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-all: test ## Run every test: the quick ones, then the slow ones, one after the other
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(READY) ## Check style, formatting and the Dockerfile
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/hadolint Dockerfile

format: $(READY) ## Format the code
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

types: $(READY) ## Check the types of src and scripts
	$(BIN)/mypy

benchmark: $(READY) ## Time one part beside its alternative: make benchmark ARGS=step
	$(BIN)/python scripts/benchmark.py $(ARGS)

# Only releases at least a week old: the malicious ones of the past were withdrawn within days.
lock: $(READY) ## Update requirements.lock from pyproject.toml; to newer versions: make lock ARGS=--upgrade
	$(BIN)/uv pip compile --no-config --quiet --universal --python-version 3.11 --exclude-newer "7 days" \
	  --generate-hashes --no-annotate --no-emit-index-url --custom-compile-command "make lock" \
	  --group dev $(ARGS) --output-file requirements.lock pyproject.toml

docker: ## Build the CUDA image
	docker build --tag $(IMAGE) .

docker-train: docker ## Train in the image; on the CPU with GPUS=, on one device with GPUS=device=0
	mkdir -p data runs/.tmp
	docker run --rm --init --stop-timeout 120 $(if $(GPUS),--gpus $(GPUS)) --shm-size 8g \
	  --cap-drop ALL --security-opt no-new-privileges --user "$$(id -u):$$(id -g)" \
	  --volume "$(CURDIR)/data:/app/data" --volume "$(CURDIR)/runs:/app/runs" $(IMAGE) \
	  fit --config $(CONFIG) $(if $(DATA),--data.path '$(DATA)') $(ARGS)

clean: ## Remove caches and build output; data, runs and .venv stay
	rm -rf build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

# pip prints its warnings and errors, and not a line for each package.
QUIETLY := --quiet --disable-pip-version-check

# .unfinished exists until the last step, so that an interrupted installation starts again.
.venv/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo '$(PYTHON) is not Python 3.11 or newer with venv; choose one: make setup PYTHON=python3.12' >&2; exit 2; }
	@if [ -e .venv/.unfinished ]; then rm -rf .venv; fi
	@mkdir -p .venv && touch .venv/.unfinished
	@echo "setup: creating .venv"
	@$(PYTHON) -m venv .venv
	@echo "setup: installing the $$(grep -c == requirements.lock) packages of requirements.lock, 6 GB: this takes minutes"
	@.venv/bin/python -m pip install --require-hashes --no-deps --only-binary :all: -r requirements.lock $(QUIETLY)
	@echo "setup: installing onestage"
	@.venv/bin/python -m pip install --no-deps --no-build-isolation -e . $(QUIETLY)
	@rm .venv/.unfinished && touch $@
	@echo "setup: done"
