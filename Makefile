# Verbs. `make` alone prints them.
, := ,
PYTHON ?= python3
# cpu, gpu-cu13 or gpu-cu12: one environment holds one of them. The CUDA 12 line has versions of its own (docs/gpu.md).
LANE   ?= cpu
VENV   ?= $(if $(filter cpu,$(LANE)),.venv,.venv-$(LANE))
EXTRAS := $(if $(filter cpu,$(LANE)),cpu$(,)nogpu,$(LANE))
PINS   := $(if $(filter gpu-cu12,$(LANE)),,--constraint constraints.txt)
RUN    := $(VENV)/bin/python
OUT    ?= demo-out
# Where a GPU host brings an environment of its own.
GPU_PYTHON ?= python3

.DEFAULT_GOAL := help
.PHONY: help setup demo engines test soak lint bench gpu-bundle gpu-check lock clean

help:  ## print this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.done  ## environment in .venv from pinned versions; on GPU hosts LANE=gpu-cu13, here and for engines

$(VENV)/.done: pyproject.toml constraints.txt pipeline/resize.c
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}: make setup PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(PINS) --editable '.[$(EXTRAS),dev]'
	@touch $@

demo: setup  ## generated pictures in, index and nine answers out, with the model that ships here (minutes)
	$(RUN) -m export.demo_pictures $(OUT)/pictures --count 900 --seed 7
	$(RUN) -m engines.build --model export/demo
	$(RUN) -m pipeline.index --source folder --root $(OUT)/pictures --model export/demo --out $(OUT)/index
	$(RUN) -m pipeline.search "a blue star" --out $(OUT)/index --grid $(OUT)/nine.png

engines: setup  ## export, compile and check the model for this host [MODEL=hub-id-or-folder RUNTIME= PRECISION= TARGET=]
	@$(RUN) -m engines.build $(if $(MODEL),--model $(MODEL)) $(if $(RUNTIME),--runtime $(RUNTIME)) $(if $(PRECISION),--precision $(PRECISION)) $(if $(TARGET),--target $(TARGET))

test: setup  ## the whole test suite
	$(RUN) -m pytest --numprocesses auto --dist loadfile $(ARGS)

soak: setup  ## every call of a night killed and failed, CYCLES=1000 kills, fuzzing for SECONDS=600
	$(RUN) tests/soak.py $(if $(CYCLES),--cycles $(CYCLES)) $(if $(SECONDS),--seconds $(SECONDS))

lint: $(VENV)/.lint  ## ruff, mypy --strict, import contracts, Dockerfile
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/hadolint docker/Dockerfile

# mypy reads CV-CUDA's type stubs, which come with 128 MB of library: only those who lint pay for them.
$(VENV)/.lint: $(VENV)/.done
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[lint]'
	@touch $@

# What only the plots and an environment of its own need.
$(VENV)/.bench: $(VENV)/.done
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(PINS) --editable '.[bench]'
	@touch $@

# Parts end by themselves at their limits, 37 minutes in all, engines built and peers installed before.
BENCH = $(RUN) -m pipeline.bench
bench: setup $(VENV)/.bench  ## the figures of docs/benchmarks on this host: PICTURES=folder-of-jpegs MODEL=folder [OUT=...]
	for model in $(MODEL) export/demo; do for precision in auto fp32 int8; do \
		$(RUN) -m engines.build --model $$model --precision $$precision; done; done
	$(BENCH) peers --pictures $(PICTURES) --model $(MODEL) --images 24 --out $(OUT)
	$(BENCH) text --model $(MODEL) --out $(OUT)
	$(BENCH) encoders --pictures $(PICTURES) --model $(MODEL) --out $(OUT)
	$(BENCH) roofline --pictures $(PICTURES) --model $(MODEL) --out $(OUT)
	$(BENCH) startup --pictures $(PICTURES) --model $(MODEL) --out $(OUT)
	$(BENCH) null --model $(MODEL) --out $(OUT)
	$(BENCH) store --out $(OUT)
	$(BENCH) ladder --pictures $(PICTURES) --model $(MODEL) --out $(OUT)

gpu-bundle: setup  ## offline bundle of wheels for an air-gapped Python 3.12 / CUDA 13 host, into bundle/
	$(RUN) docker/gpu_bundle.py bundle

# A checkout that was unpacked, not installed, lacks the compiled image stage: 3.7 instead of 0.6 ms a picture.
# The flags are those of pyproject.toml.
pipeline/_resize.so: pipeline/resize.c
	-cc -O3 -std=gnu11 -ffp-contract=off -shared -fPIC $< -o $@ -lm

gpu-check: pipeline/_resize.so  ## GPU tests, then what this host really does and how fast, into docs/benchmarks/ (8 minutes) [GPU_PYTHON=python3]
	$(GPU_PYTHON) -m pipeline.gpu_check

lock: setup  ## renew constraints.txt from what .venv holds
	$(VENV)/bin/pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

clean:  ## remove what make made here
	rm -rf $(VENV) $(OUT) artifacts bundle
