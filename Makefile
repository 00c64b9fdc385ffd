# Every target sets up what it needs in .venv: nothing has to be installed by hand but python3 (>= 3.10), make and g++.
# A torch (>= 2.10) that python3 already has, with CUDA or without, is used as it is; else the version below is installed.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
NATIVE := setup.py pyproject.toml $(shell find csrc -type f)

# Two files of tests at a time; threads that wait leave the cores to the others.
WORKERS ?= 2
TESTS    = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: demo test test-gpu bench install clean

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt scripts/setup_venv.sh $(NATIVE)
	bash scripts/setup_venv.sh "$(PYTHON)" "$(VENV)" "$(TORCH)"
	@touch $@

demo: install
	$(BIN)/python examples/digits_clip.py

test: install
	$(TESTS) -m "not interpreter and not gpu"
	TRITON_INTERPRET=1 $(TESTS) -m interpreter
	# Two processes that use one core each most of the time.
	$(BIN)/python -m pytest bench/regression.py --benchmark-disable & regression=$$!; \
	PYTHON="$(BIN)/python" bash bench/gpu_report.sh --dry --no-install --output build/gpu_dry; dry=$$?; \
	wait $$regression && exit $$dry

test-gpu: install
	$(BIN)/python -m pytest -m gpu

bench: install
	$(BIN)/python -m bench run
	$(BIN)/python -m bench report

clean:
	rm -rf $(VENV) build dist *.egg-info replearn_kernels/_native*.so
