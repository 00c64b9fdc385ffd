# Every target sets up what it needs in .venv: nothing has to be installed by hand but python3 (>= 3.10), make and g++.
# A torch (>= 2.10) that python3 already has, with CUDA or without, is used as it is; else the version below is installed.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
NATIVE := setup.py pyproject.toml $(shell find csrc -type f)

# Two files of tests at a time, and beside them one of what else `make test` does, which fills the cores while tests
# wait for processes or for time to pass. OpenMP's threads, too, leave the cores to others while they wait.
WORKERS ?= 2
BESIDE  := $(shell expr \( $(WORKERS) + 1 \) / 2)
test-%: export OMP_WAIT_POLICY = passive
# The long files of tests/conftest.py come first, not those of many tests.
PYTEST   = $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-suite test-beside test-interpreter test-regression test-rehearsal test-triton-3.6 \
  test-integrations test-gpu bench bench-integrations \
  install packages clean

install: $(VENV)/.installed

SCRIPTS := $(addprefix scripts/,setup_venv.sh venv_beside.sh requirements_beside_torch.py)

$(VENV)/.installed: requirements.txt $(SCRIPTS) $(NATIVE)
	bash scripts/setup_venv.sh "$(PYTHON)" "$(VENV)" "$(TORCH)"
	@touch $@

demo: install
	$(BIN)/python examples/digits_clip.py

# The suite, which takes longest, and beside it the rest, one after another: what each of these says is shown when it
# has ended. All of them run, whatever fails.
test: install
	$(MAKE) -j2 --keep-going test-suite test-beside

test-beside: install
	$(MAKE) --output-sync=target packages test-integrations test-triton-3.6 test-interpreter test-regression test-rehearsal

test-suite: install
	$(PYTEST) -n $(WORKERS) -m "not interpreter and not gpu"

# Only the files that have such tests: collecting all of them takes as long as some of these run.
test-interpreter: install
	TRITON_INTERPRET=1 $(PYTEST) -n $(BESIDE) -m interpreter $$(grep -l interpreter tests/test_*.py)

test-regression: install
	$(BIN)/python -m pytest bench/regression.py --benchmark-disable

test-rehearsal: install
	PYTHON="$(BIN)/python" bash bench/gpu_report.sh --dry --output build/gpu_dry

# Of the oldest Triton that is supported (torch 2.11 has it): every kernel compiled for one GPU, and interpreted once; and
# what the GPU report calls of Triton itself.
TRITON_36 := $(VENV)/triton-3.6
PYTEST_36  = $(TRITON_36)/bin/python -m pytest -n $(BESIDE)

$(TRITON_36)/.installed: $(VENV)/.installed scripts/setup_triton_venv.sh scripts/packages_of.sh
	bash scripts/setup_triton_venv.sh "$(VENV)" "triton==3.6.*" "$(TRITON_36)"
	@touch $@

test-triton-3.6: install $(TRITON_36)/.installed
	$(PYTEST_36) tests/test_triton*.py -m aot -k "not sm_80 and not sm_100"
	TRITON_INTERPRET=1 $(PYTEST_36) tests/test_triton*.py -m interpreter -k "several_tiles or shipped_blocks"
	PYTHON="$(TRITON_36)/bin/python" bash bench/gpu_report.sh --dry --stages profile,configs --output build/gpu_dry_3.6

# The losses beside those of other libraries, in whose code they stand.
INTEGRATIONS := $(VENV)/integrations

$(INTEGRATIONS)/.installed: $(VENV)/.installed requirements-integrations.txt scripts/setup_integrations_venv.sh \
  scripts/packages_of.sh
	bash scripts/setup_integrations_venv.sh "$(VENV)" requirements-integrations.txt "$(INTEGRATIONS)"
	@touch $@

test-integrations: install $(INTEGRATIONS)/.installed
	$(INTEGRATIONS)/bin/python -m pytest -n $(BESIDE) --dist loadfile tests/integrations

# Where torchvision's operators do not load, open_clip can be imported all the same (tests/integrations).
bench-integrations: install $(INTEGRATIONS)/.installed
	PYTHONPATH=tests/integrations $(INTEGRATIONS)/bin/python -c "import without_torchvision_operators, bench.integrations; \
	  bench.integrations.main()" --output bench/local_results/integrations.csv
	$(INTEGRATIONS)/bin/python -m bench.integrations_memory --output bench/local_results/integrations_memory.csv

packages: install
	bash scripts/check_packages.sh "$(BIN)/python"

test-gpu: install
	$(BIN)/python -m pytest -m gpu

bench: install
	$(BIN)/python -m bench run
	$(BIN)/python -m bench report

clean:
	rm -rf $(VENV) build dist *.egg-info replearn_kernels/_native*.so
