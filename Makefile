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

.PHONY: demo test test-gpu test-triton-3.6 bench install packages clean

install: $(VENV)/.installed

SCRIPTS := $(addprefix scripts/,setup_venv.sh venv_beside.sh requirements_beside_torch.py)

$(VENV)/.installed: requirements.txt $(SCRIPTS) $(NATIVE)
	bash scripts/setup_venv.sh "$(PYTHON)" "$(VENV)" "$(TORCH)"
	@touch $@

demo: install
	$(BIN)/python examples/digits_clip.py

test: install packages
	$(TESTS) -m "not interpreter and not gpu"
	TRITON_INTERPRET=1 $(TESTS) -m interpreter
	# Two processes that use one core each most of the time.
	$(BIN)/python -m pytest bench/regression.py --benchmark-disable & regression=$$!; \
	PYTHON="$(BIN)/python" bash bench/gpu_report.sh --dry --output build/gpu_dry; dry=$$?; \
	wait $$regression && exit $$dry
	$(MAKE) test-triton-3.6

# Of the oldest Triton that is supported (torch 2.11 has it): every kernel compiled for one GPU, and interpreted once; and
# what the GPU report calls of Triton itself.
TRITON_36 := $(VENV)/triton-3.6
TESTS_36   = OMP_WAIT_POLICY=passive $(TRITON_36)/bin/python -m pytest -n $(WORKERS)

$(TRITON_36)/.installed: $(VENV)/.installed scripts/setup_triton_venv.sh
	bash scripts/setup_triton_venv.sh "$(VENV)" "triton==3.6.*" "$(TRITON_36)"
	@touch $@

test-triton-3.6: install $(TRITON_36)/.installed
	$(TESTS_36) tests/test_triton*.py -m aot -k "not sm_80 and not sm_100"
	TRITON_INTERPRET=1 $(TESTS_36) tests/test_triton*.py -m interpreter -k "several_tiles or shipped_blocks"
	PYTHON="$(TRITON_36)/bin/python" bash bench/gpu_report.sh --dry --stages profile,configs --output build/gpu_dry_3.6

packages: install
	bash scripts/check_packages.sh "$(BIN)/python"

test-gpu: install
	$(BIN)/python -m pytest -m gpu

bench: install
	$(BIN)/python -m bench run
	$(BIN)/python -m bench report

clean:
	rm -rf $(VENV) build dist *.egg-info replearn_kernels/_native*.so
