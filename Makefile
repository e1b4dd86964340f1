# make demo   everything on the embedded trained model: trace, calibrate, compile, run, compare
# make test   all tests (.ci/run: with make lint)
# make plans  the shipped plans again
# make check  seconds: formatting, types, import rules, goldens, fast tests
# make lint   formatting and types alone
PYTHON ?= python3
VENV   ?= .venv
DEMO   := build/demo
MODEL  := examples/tiny-mixtral
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
FAST   := -m 'not slow and not gpu'
STYLE  := $(BIN)/ruff check . && $(BIN)/ruff format --check .
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_CONSTRAINT = $(CURDIR)/constraints.txt

.PHONY: demo test lint check test-gpu test-nodes test-sanitizers plans models golden clean

# torch goes first: with it in place, no other requirement can pull in a different build of it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python $$($(PYTHON) -V 2>&1 | cut -d" " -f2) found, 3.11 or newer expected" >&2; \
	    echo "hint: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch
	$(BIN)/pip install --quiet --editable '.[compiler,hf,onnx,dev]'
	@touch $@

$(DEMO)/trace.safetensors: | $(READY)
	$(BIN)/fiddlerc trace $(MODEL) --text $(MODEL)/heldout-chat.txt --text $(MODEL)/heldout-docs.txt \
	  --max-tokens 8192 -o $@

$(DEMO)/hw.json: | $(READY)
	$(BIN)/fiddlerc calibrate --quick --model $(MODEL) -o $@

$(DEMO)/plan/plan.json: $(DEMO)/trace.safetensors $(DEMO)/hw.json | $(READY)
	$(BIN)/fiddlerc compile $(MODEL) --hw $(DEMO)/hw.json --trace $(DEMO)/trace.safetensors \
	  --gpu-memory 43MiB --context 1024 -o $(DEMO)/plan

# Text through all three strategies, on the accelerator that was calibrated; then the CPU lane alone beside transformers.
demo: $(DEMO)/plan/plan.json
	$(BIN)/fiddlerc run $(DEMO)/plan --model $(MODEL) --stream --max-new-tokens 48 --prompt - < examples/prompt.txt
	$(BIN)/fiddlerc bench $(DEMO)/plan --model $(MODEL) --rounds 3
	$(BIN)/fiddlerc bench $(DEMO)/plan --model $(MODEL) --rounds 3 --device none
	@echo "report: $(DEMO)/plan/report.html"

test: $(READY)
	$(BIN)/pytest

lint: $(READY)
	$(STYLE)
	$(BIN)/mypy

check: $(READY)
	$(STYLE)
	@mkdir -p build
	@# Two halves side by side. The first run of mypy, without its cache, takes as long as the tests.
	@{ $(BIN)/mypy && $(BIN)/pytest -q $(FAST) tests/golden; } > build/check.log 2>&1 & half=$$!; \
	  $(BIN)/pytest -q $(FAST) tests/unit; tests=$$?; \
	  wait $$half; half=$$?; cat build/check.log; exit $$((tests + half))

# Part of `make test` too: the kernels under AddressSanitizer, UBSan and ThreadSanitizer.
test-sanitizers: $(READY)
	$(BIN)/pytest -rP tests/sanitizers

# Where the weights lie on a machine with several memory nodes, emulated: needs QEMU (tests/nodes.sh).
test-nodes: $(READY)
	tests/nodes.sh 2
	tests/nodes.sh 4

# On a machine with an NVIDIA GPU: its tests, and what they measured, in build/test-gpu.log. Needs a CUDA build of torch.
test-gpu: $(READY)
	@mkdir -p build
	@{ date -u; uname -srm; $(BIN)/fiddlerc doctor; $(BIN)/pytest -m gpu -rA; echo $$? > build/test-gpu.rc; } \
	  2>&1 | tee build/test-gpu.log; ! grep '^tests/gpu: nothing was run' build/test-gpu.log && exit $$(cat build/test-gpu.rc)

# The shipped plans, from inputs that are all in the repository.
plans: $(READY)
	$(BIN)/fiddlerc compile mixtral --hw a100 --no-build -o plans/mixtral-8x7b-a100
	$(BIN)/fiddlerc compile $(MODEL) --hw epyc-zen5-2c --trace $(MODEL)-trace.safetensors \
	  --gpu-memory 43MiB --context 1024 --no-build -o plans/tiny-mixtral-epyc-zen5-2c

# docs/models.md: what the families' tests find, written down.
models: $(READY)
	$(BIN)/pytest -q tests/unit/test_hf_families.py --update-golden
	$(BIN)/python -m tests.models_document

golden: $(READY)
	$(BIN)/pytest -q tests/golden --update-golden

clean:
	rm -rf build $(VENV)
