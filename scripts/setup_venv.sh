#!/usr/bin/env bash
# Makes a virtual environment with everything the demo, the tests and the benchmarks need.
# usage: setup_venv.sh PYTHON VENV TORCH_REQUIREMENT
set -euo pipefail
python=$1 venv=$2 torch=$3

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  { echo "replearn-kernels needs Python 3.10 or newer; set PYTHON=/path/to/python3" >&2; exit 1; }

no_venv() { echo "$python -m venv failed; on Debian and Ubuntu: apt install python3-venv python3-dev" >&2; exit 1; }

# A torch that is already there may be the only one that fits its GPU's driver: build on it, install no other.
has_torch='import sys, torch; sys.exit(tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 10))'
if "$python" -c "$has_torch" 2>/dev/null; then
  echo "Using the torch that $python already has."
  bash scripts/venv_beside.sh "$python" "$venv" || no_venv
else
  "$python" -m venv "$venv" || no_venv
  read -ra torch <<<"$torch"  # options may follow the version
  "$venv/bin/python" -m pip install --quiet "${torch[@]}"
fi
"$venv/bin/python" scripts/requirements_beside_torch.py requirements.txt >"$venv/requirements.txt"
"$venv/bin/python" -m pip install --quiet -r "$venv/requirements.txt"
"$venv/bin/python" -m pip install --quiet --no-build-isolation --no-deps -e .
"$venv/bin/python" - <<'PY'
import torch, replearn_kernels
from replearn_kernels.engine import native
print(f"torch {torch.__version__}, C++ kernels:", native.why_missing() or torch.ops.replearn_kernels.instruction_set())
PY
