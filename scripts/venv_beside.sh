#!/usr/bin/env bash
# Makes a virtual environment that finds all packages of PYTHON, also where that is in a virtual environment itself.
# usage: venv_beside.sh PYTHON VENV [OPTION OF python -m venv]...
set -euo pipefail
python=$1 venv=$2

"$python" -m venv "${@:3}" "$venv"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sys; print(*filter(None, sys.path), sep="\n")' >"$site/outer.pth"
