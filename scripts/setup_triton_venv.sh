#!/usr/bin/env bash
# Makes a virtual environment with another Triton; all else in it is VENV's: torch, pytest, this package.
# usage: setup_triton_venv.sh VENV TRITON_REQUIREMENT OTHER_VENV
set -euo pipefail
venv=$1 triton=$2 other=$3

"$venv/bin/python" -m venv --without-pip --clear "$other"
packages=$("$other/bin/python" -c 'import site; print(site.getsitepackages()[0])')
"$venv/bin/python" -m pip install --quiet --no-deps --target "$packages" "$triton"
# So that its own Triton comes first.
bash scripts/packages_of.sh "$venv" > "$packages/packages_of_venv.pth"
"$other/bin/python" - <<'PY'
import sys

import torch
import triton

assert triton.__file__.startswith(sys.prefix), triton.__file__
print(f"torch {torch.__version__}, Triton {triton.__version__}")
PY
