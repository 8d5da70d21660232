# Everything a developer types. The first run of a target creates what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODELS ?=
SERVE_FLAGS ?=
NATIVE := $(wildcard kernels/trivium_kernels/cpu/native/*)
PYTEST_FLAGS ?=
BENCH_FLAGS ?=
SOAK := $(BIN)/pytest -q --timeout 0 -o faulthandler_timeout=0
# Processes start from the installed package, never from a folder name in the working directory.
export PYTHONSAFEPATH := 1

.PHONY: serve test soak check format proto bench bench-parts clean

serve: $(VENV)/.serve
	$(BIN)/trivium serve $(MODELS) $(SERVE_FLAGS)

# No worker is replaced: with --dist loadgroup a run that lost one at its end would wait for ever.
test: $(VENV)/.dev
	$(BIN)/pytest -q -n 2 --dist loadgroup --max-worker-restart 0 $(PYTEST_FLAGS)

# A million steps of random scheduler histories instead of ten thousand, a thousand random timelines instead of fifty,
# with the toy executor and with real models; a hundred batches of requests for everything at once instead of one; every
# kernel compiled at full size for A100, H100 and RTX 50, and as models launch them; the table of hostile requests three
# times, each answered within a second.
soak: $(VENV)/.dev
	TRIVIUM_SOAK_STEPS=1000000 $(SOAK) -k no_history_breaks tests/unit/scheduler/test_state_machine.py
	TRIVIUM_SOAK_TRACES=1000 $(SOAK) -k random_timelines tests/unit/scheduler/test_scheduler.py
	TRIVIUM_SOAK_TRACES=1000 $(SOAK) -s tests/integration/test_random_timelines.py
	TRIVIUM_SOAK_COMBINATIONS=100 $(SOAK) tests/integration/test_combinations.py
	$(BIN)/python benchmarks/gpu.py --compile 80
	$(BIN)/python benchmarks/gpu.py --compile 90
	$(BIN)/python benchmarks/gpu.py --compile 120
	TRIVIUM_SOAK_GPU=1 $(SOAK) tests/gpu_path/test_compiled.py
	TRIVIUM_SOAK_TABLES=3 TRIVIUM_STRICT_TIMES=1 $(SOAK) -s tests/integration/test_hostile.py
	TRIVIUM_STRICT_TIMES=1 $(SOAK) -k pathological tests/integration/test_structured_served.py

check: $(VENV)/.dev $(VENV)/proto/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks/compare.py benchmarks/beam.py benchmarks/structured.py benchmarks/worker.py
	$(BIN)/pytest -q tests/contract

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(VENV)/proto/.done
	$(VENV)/proto/bin/python -m grpc_tools.protoc -I protos --python_out=services --pyi_out=services \
		--grpc_python_out=services protos/trivium/v1/*.proto

# This project against its peers: minutes on two cores, with BENCH_FLAGS=--full more. TRIVIUM_BENCH_VLLM names the Python
# interpreter of an environment that has vLLM.
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/compare.py $(BENCH_FLAGS)

# What only concerns this project, beams against peers and themselves; kernels and models on a GPU, if there is one.
bench-parts: $(VENV)/.dev
	$(BIN)/python benchmarks/beam.py
	$(BIN)/python benchmarks/structured.py
	$(BIN)/python benchmarks/quantization.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/scheduler.py
	$(BIN)/python benchmarks/prefix_cache.py
	$(BIN)/python benchmarks/transport.py
	$(BIN)/python benchmarks/gpu.py || test $$? = 2

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: $(VENV)/bin/python pyproject.toml constraints.txt $(NATIVE)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt $(NATIVE)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.serve

# The generator has an environment of its own: it needs an older protobuf than the one that runs (docs/decisions.md).
$(VENV)/proto/.done: $(VENV)/bin/python pyproject.toml
	$(PYTHON) -m venv $(VENV)/proto
	$(VENV)/proto/bin/pip install --quiet --disable-pip-version-check 'grpcio-tools==1.75.1' 'setuptools<81'
	touch $@
