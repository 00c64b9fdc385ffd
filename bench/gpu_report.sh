#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in a few minutes, from the checkout as it is: nothing is installed or downloaded.
# gpu_report.py does the work; this finds a Python for it. See bench/README.md.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
fail() { printf 'gpu_report: %s\n' "$*" >&2; exit 1; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    fail "$python is no Python >= 3.10; set PYTHON to the interpreter that has torch"
"$python" -c 'import importlib.util as util, sys; sys.exit(util.find_spec("torch") is None)' ||
    fail "$python has no torch; set PYTHON to the interpreter that has it"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" "$root/bench/gpu_report.py" --spent "$SECONDS" "$@"
