# Every target sets up what it needs: a virtual environment with the pinned packages of requirements.lock.
#
#   make train [ARGS="experiment=NAME key=value"]   train and evaluate
#   make test | lint | bench                        tests on CPU, ruff and pyright, benchmarks on CPU
#   make soak                                       kill -9 in training and in writing, fifty times
#   make gpu                                        GPU tests, then benchmarks; fails where there is no GPU
#   make lock                                       compile requirements.lock from pyproject.toml (network)
#   make clean                                      remove the environment and caches (never a run)
#
#   PYTHON=python3     use this interpreter as it is and skip all set-up
#   TORCH_INDEX=URL    one more package index, for PyTorch builds without CUDA
#   ARGS="..."         handed to the command; of bench and gpu to benchmarks.attention
#   MODELS="..."       of bench and gpu, handed to benchmarks.models

VENV ?= .venv
ARGS ?=
MODELS ?=
TORCH_INDEX ?=
TEST_WORKERS ?= 2
# seconds after which `make gpu` begins no other case of the benchmark: all of it stays under ten minutes
GPU_BUDGET ?= 300
# the same of whole encoders, after it
MODELS_BUDGET ?= 100
INSTALLED := $(VENV)/.installed
# the pair the lock is compiled for
LOCK_TORCH := torch==2.13.0 triton==3.7.1
PIP_INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# only a value on the command line counts: an exported PYTHON is often meant for something else
ifeq ($(origin PYTHON),command line)
  RUN := $(PYTHON)
  SETUP :=
else
  RUN := $(VENV)/bin/python
  SETUP := $(INSTALLED)
endif

.PHONY: train test soak lint bench gpu lock clean
.DELETE_ON_ERROR:

train: $(SETUP)
	$(RUN) train.py $(ARGS)

test: export OMP_NUM_THREADS = 1
test: export MKL_NUM_THREADS = 1
test: $(SETUP)
	$(RUN) -m pytest -m "not gpu" -n $(TEST_WORKERS) $(ARGS)

soak: export OMP_NUM_THREADS = 1
soak: $(SETUP)
	$(RUN) -m pytest --soak -s tests/test_soak.py tests/training/test_checkpoint_kills.py $(ARGS)

lint: $(SETUP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)

# twice: as it comes, and with freed memory kept by the process, where no call pays for fresh pages
bench: KEPT = MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000
bench: $(SETUP)
	$(RUN) -m benchmarks.attention $(ARGS)
	$(KEPT) $(RUN) -m benchmarks.attention --output benchmarks/results/attention_cpu_memory_kept.csv $(ARGS)
	$(RUN) -m benchmarks.models $(MODELS)

# correctness first: where it fails nothing is timed. The files that hold GPU tests, by name: a GPU machine with a torch of
# its own may lack what others import
gpu: $(SETUP)
	@$(RUN) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu: torch sees no CUDA device")'
	$(RUN) -m pytest -m gpu $$(grep -rl --include='test_*.py' 'mark\.gpu' tests)
	$(RUN) -m benchmarks.attention --device cuda --budget $(GPU_BUDGET) \
	  $(if $(OUT),--output "$(OUT)/attention_cuda.csv") $(ARGS)
	$(RUN) -m benchmarks.models --device cuda --budget $(MODELS_BUDGET) \
	  $(if $(OUT),--output "$(OUT)/models_cuda.csv") $(MODELS)

$(INSTALLED): requirements.lock constraints.txt
	@for python in python3 python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "set-up: $(VENV) from $$($$python --version)"; exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	echo "error: no Python 3.11 or newer with its venv module was found (tried python3, python3.13, python3.12," \
	     "python3.11). Install one, or name yours: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 1
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet $(PIP_INDEX) -r requirements.lock -c constraints.txt
	@touch $@

# a resolve without an installation; what the CUDA build of torch asks for is left to the machine that has CUDA
define LOCK_SCRIPT
import json, sys
print("# compiled from pyproject.toml by `make lock` (runtime and dev); do not edit")
for item in sorted(json.load(sys.stdin)["install"], key=lambda item: item["metadata"]["name"].lower()):
    name, version = item["metadata"]["name"], item["metadata"]["version"].split("+")[0]
    marker = ' ; sys_platform == "linux"' if name == "triton" else ""
    if name != "longspan" and not name.startswith(("nvidia-", "cuda-")):
        print(f"{name}=={version}{marker}")
endef
export LOCK_SCRIPT

lock: $(SETUP)
	$(RUN) -m pip install --quiet --dry-run --ignore-installed --report - $(PIP_INDEX) -c constraints.txt \
	  ".[dev]" $(LOCK_TORCH) > .lock.json
	$(RUN) -c "$$LOCK_SCRIPT" < .lock.json > requirements.lock
	rm -r .lock.json longspan.egg-info

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
