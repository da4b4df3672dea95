# make demo    the main job on a real model: installs, optimises, answers a question
# make test    the tests, without torch          make check    linter, formatter, type checker
# make parity  live comparison with transformers  make verify   figures, soaks, other Pythons
# make clean   removes what runs leave behind; the virtual environments stay

candidates := python3 python3.13 python3.12 python3.11
new_enough = $(shell $(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(1))
PYTHON ?= $(firstword $(foreach python,$(candidates),$(call new_enough,$(python))))
WORKERS ?= 2
PROMPT ?= Why is the sky blue?

# Scripts in benchmarks/ that `make verify` runs; each writes its figures into benchmarks/results/. Those of PEER
# run where it names a Python that has llama-cpp-python, and PEER_MODELS the folder with its forms of the model.
BENCHMARKS := long_tests quality pruning speculation engine_load cpu_attention pipeline size_ahead size_here
PEER_BENCHMARKS := tokenizer_agreement llama_cpp_loads
PEER ?=
PEER_MODELS ?=
OPENVINO ?=
define NO_PEER
*** SKIPPED, as PEER is not set: $(PEER_BENCHMARKS) engine_peers, and the verify tests against llama.cpp.
*** Their records in benchmarks/results/ are not of this run. To have them:
***   python3 -m venv .venv-peer && .venv-peer/bin/pip install llama-cpp-python
***   make verify PEER=.venv-peer/bin/python
endef
export NO_PEER
OTHER_PYTHONS := $(foreach version,3.12 3.13,$(if $(call new_enough,python$(version)),$(version)))
# With this Python, and the compiler of this JAX, the engine's step is compiled for a GPU; no GPU is needed.
CUDA := $(if $(filter 3.12,$(OTHER_PYTHONS)),test-cuda)
CUDA_JAX := 0.12.0.*

bin := .venv/bin
pip := -m pip install --quiet --disable-pip-version-check
pytest := -m pytest --numprocesses=$(WORKERS) --dist=loadfile --durations=25

.PHONY: demo test check parity verify test-cuda clean
.DELETE_ON_ERROR:
.SECONDARY:

demo: .venv/.installed
	$(bin)/jaxopt-llm optimize --model=smollm2-135m-instruct --config=int8 --out=out/demo
	$(bin)/jaxopt-llm generate --model=out/demo --chat --prompt="$(PROMPT)"

test: .venv/.installed-dev
	$(bin)/python $(pytest) -m "not parity and not verify" tests

check: .venv/.installed-dev
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

parity: .venv-parity/.installed
	.venv-parity/bin/python -m pytest -m parity tests/parity

verify: .venv/.installed-dev .venv-parity/.installed $(OTHER_PYTHONS:%=test-%) $(CUDA)
	set -e; for name in $(BENCHMARKS); do $(if $(PEER),JAXOPT_PEER=$(PEER)) $(bin)/python -m benchmarks.$$name; done
	.venv-parity/bin/python -m benchmarks.transformers_parity
	set -e; for name in $(if $(PEER),$(PEER_BENCHMARKS)); do $(bin)/python -m benchmarks.$$name --peer=$(PEER); done
	$(if $(PEER_MODELS),$(bin)/python -m benchmarks.engine_peers --peer=$(PEER) --models=$(PEER_MODELS) $(OPENVINO:%=--openvino=%))
	$(bin)/python -m benchmarks.step --shape=llama3.2-1b --quantize=int8,int8_block,int4 --batch=1 --dtype=float32 --name=step_1b
	@$(if $(PEER),,echo "$$NO_PEER" >&2)
	@$(if $(CUDA),,echo "*** SKIPPED, as there is no python3.12: test-cuda, which compiles for a GPU." >&2)

test-cuda: .venv-cuda/.installed
	JAX_PLATFORMS=cpu .venv-cuda/bin/python -m pytest -m verify tests/verify/test_gpu_ahead.py

test-%: .venv-%/.installed
	.venv-$*/bin/python $(pytest) -m "not parity and not verify" tests

clean:
	rm -rf build dist out .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# A stamp is newer than these when that environment holds what they ask for.
built_from := pyproject.toml setup.py $(wildcard jaxopt_llm/kernels/cpu/*.cc jaxopt_llm/kernels/cpu/*.h)

.venv/.installed: $(built_from) | .venv/bin/python
	$(bin)/python $(pip) --editable .
	@touch $@

.venv/.installed-dev: $(built_from) | .venv/bin/python
	$(bin)/python $(pip) --editable '.[dev]'
	@touch .venv/.installed $@

.venv-parity/.installed: $(built_from) | .venv-parity/bin/python
	.venv-parity/bin/python $(pip) --editable '.[dev,parity]'
	@touch $@

.venv-cuda/.installed: $(built_from) | .venv-cuda/bin/python
	.venv-cuda/bin/python $(pip) --editable '.[dev]' 'jax==$(CUDA_JAX)'
	.venv-cuda/bin/python $(pip) --no-deps 'jax-cuda12-plugin==$(CUDA_JAX)' 'jax-cuda12-pjrt==$(CUDA_JAX)'
	@touch $@

.venv-%/.installed: $(built_from) | .venv-%/bin/python
	.venv-$*/bin/python $(pip) --editable '.[dev]'
	@touch $@

.venv/bin/python .venv-parity/bin/python:
	$(or $(PYTHON),$(error Python 3.11 or newer is needed; set PYTHON to one)) -m venv $(@:/bin/python=)

.venv-cuda/bin/python:
	python3.12 -m venv .venv-cuda

.venv-%/bin/python:
	python$* -m venv .venv-$*
