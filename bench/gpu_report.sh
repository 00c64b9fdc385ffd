#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command and without network: installs the tree beside the machine's own
# torch and triton, runs the GPU tests, measures, and writes tables and plots.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: bench/gpu_report.sh [--output DIR] [--no-install] [--dry]

  --output DIR   where the results go (default: bench/local_results/gpu, which git ignores)
  --no-install   use replearn_kernels as the current environment finds it, instead of installing the tree in a new venv
  --dry          rehearse on the CPU with tiny sizes and Triton's interpreter; needs --output

Needs python3 with torch >= 2.10, triton >= 3.6, pip and setuptools >= 77; for the tests pytest, hypothesis and
pytest-benchmark. typer, rich and matplotlib are used where they are installed. PYTHON names another interpreter than
python3.
USAGE
}

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'gpu_report: %s\n' "$*" >&2; exit 1; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
output= install=yes dry=no
while (($#)); do
    case $1 in
        --output) output=${2:?--output needs a directory}; shift 2 ;;
        --no-install) install=no; shift ;;
        --dry) dry=yes; shift ;;
        -h | --help) usage; exit ;;
        *) usage >&2; fail "unknown argument: $1" ;;
    esac
done
[[ $dry == no || -n $output ]] || fail "--dry needs --output, so that its figures never pass for results"
mkdir -p "${output:=$root/bench/local_results/gpu}"
output=$(cd "$output" && pwd)
cd "$root"

failed=()
step() { # step NAME COMMAND...: runs it, keeps its output in NAME.log, and goes on if it fails
    say "$1: ${*:2}"
    if ! "${@:2}" 2>&1 | tee "$output/$1.log"; then
        failed+=("$1")
        printf 'gpu_report: step %s failed, see %s\n' "$1" "$output/$1.log" >&2
    fi
}

check_machine() {
    "$python" -c 'import torch' 2>/dev/null || fail "$python has no torch; set PYTHON to the interpreter that has it"
    [[ $dry == no ]] || return 0
    "$python" - <<'PY' || fail "this machine cannot run the report"
import sys
import torch

try:
    import triton
except ImportError:
    sys.exit("triton is not installed; the GPU kernels need triton >= 3.6")


def at_least(version, needed):
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2]) >= needed


if not at_least(torch.__version__, (2, 10)):
    sys.exit(f"torch >= 2.10 is needed, found {torch.__version__}")
if not at_least(triton.__version__, (3, 6)):
    sys.exit(f"triton >= 3.6 is needed, found {triton.__version__}")
if not torch.cuda.is_available():
    sys.exit("torch finds no CUDA device; use --dry to rehearse without one")
PY
}

install_tree() { # a venv that sees all packages of $python, also where that is itself inside a venv
    "$python" -c 'import setuptools, pip' || fail "$python needs pip and setuptools to build without network"
    say "install: the tree, in a venv of its own"
    venv=$(mktemp -d)
    trap 'rm -rf "$venv"' EXIT
    # Without pip: on older Pythons it comes with a setuptools that would hide the machine's own.
    bash scripts/venv_beside.sh "$python" "$venv" --without-pip || fail "cannot make a venv; try --no-install"
    python=$venv/bin/python
    "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps -e "$root" >"$output/install.log" 2>&1 ||
        { tail -n 20 "$output/install.log" >&2; fail "the build failed, see $output/install.log"; }
}

describe_machine() {
    if command -v nvidia-smi >/dev/null; then nvidia-smi >"$output/nvidia-smi.txt"; fi
    "$python" -m torch.utils.collect_env >"$output/environment.txt" 2>&1 || true
    "$python" -c 'from bench.results import machine; import sys
for name, value in machine(sys.argv[1]).items(): print(f"{name}: {value}")' "$device" | tee "$output/versions.txt"
}

measure() { # measure NAME OPTIONS...
    step "bench_$1" "$python" -m bench run --device "$device" --output "$output" "${@:2}"
}

rehearse_tests() { # 5: no test is marked gpu yet
    "$python" -m pytest -m gpu --collect-only tests || [[ $? == 5 ]]
}

check_machine
[[ $install == no ]] || install_tree
device=cuda
if [[ $dry == yes ]]; then device=cpu; export TRITON_INTERPRET=1; fi

say "machine"
describe_machine

if [[ $dry == yes ]]; then
    backends=(--backend auto)
    if "$python" -c 'import triton' 2>/dev/null; then backends+=(--backend triton); fi
    step tests rehearse_tests
    tiled=(--case info_nce --case siglip --case nt_xent --case sup_con --case arcface --case lifted --case contrastive --case batch_hard --case semi_hard --case batch_all)
    short=("${backends[@]}" --d 16 --rounds 2 --seconds 0 --no-compiled --no-memory)
    measure sizes --case clip --n 16 --n 32 "${short[@]}"
    measure speed "${tiled[@]}" --n 16 "${short[@]}"
    measure memory --case clip --n 32 --d 16 --no-speed --implementation ours
else
    step tests "$python" -m pytest -m gpu --continue-on-collection-errors tests
    measure clip_bf16 --case clip --dtype bf16 --n 1024 --n 4096 --n 16384 --n 65536 --d 128 --d 512 --d 768
    measure clip_fp32 --case clip --dtype fp32 --n 1024 --n 8192 --n 16384 --d 512
    measure info_nce_bf16 --case info_nce --dtype bf16 --n 1024 --n 4096 --n 16384 --n 65536 --d 512
    measure siglip_bf16 --case siglip --dtype bf16 --n 4096 --n 16384 --n 65536 --d 512 --d 768
    measure batch_bf16 --case nt_xent --case sup_con --dtype bf16 --n 4096 --n 16384 --n 65536 --d 128 --d 512
    measure distances_bf16 --case lifted --case contrastive --case batch_hard --case semi_hard --case batch_all --dtype bf16 --n 4096 --n 16384 --n 65536 --d 128 --d 512
    measure classes_bf16 --case arcface --dtype bf16 --n 100000 --n 1000000 --d 512
    measure prototypes_bf16 --case dino_head --dtype bf16 --n 64 --d 256
    step regression "$python" -m pytest bench/regression.py --benchmark-json "$output/regression.json"
fi
step report "$python" -m bench report --output "$output"

if ((${#failed[@]})); then fail "failed steps: ${failed[*]}; the others' results are in $output"; fi
say "done: results in $output"
