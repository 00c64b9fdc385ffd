#!/usr/bin/env bash
# Prints the lines of a .pth file by which another environment finds the packages of VENV, behind its own, with what
# .pth files there say, so that an editable installation counts.
# usage: packages_of.sh VENV
set -euo pipefail

"$1/bin/python" - <<'PY'
import site

for directory in site.getsitepackages() + [site.getusersitepackages()] * bool(site.ENABLE_USER_SITE):
    print(f"import site; site.addsitedir({directory!r})")
PY
