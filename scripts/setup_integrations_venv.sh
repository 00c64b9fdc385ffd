#!/usr/bin/env bash
# Makes a virtual environment with the libraries that have integrations; all else in it is VENV's, above all its torch.
# usage: setup_integrations_venv.sh VENV REQUIREMENTS OTHER_VENV
set -euo pipefail
venv=$1 requirements=$2 other=$3

"$venv/bin/python" -m venv --without-pip --clear "$other"
packages=$("$other/bin/python" -c 'import site; print(site.getsitepackages()[0])')
bash scripts/packages_of.sh "$venv" > "$packages/packages_of_venv.pth"
"$venv/bin/python" -m pip freeze --exclude-editable | grep -iE '^(torch|triton|numpy)==' > "$other/constraints.txt"
"$venv/bin/python" -m pip --python "$other/bin/python" install --quiet -r "$requirements" -c "$other/constraints.txt"
