#!/usr/bin/env bash
# Builds the sdist and the wheel, checks both, and runs a loss from each where nothing else of this checkout is.
# usage: check_packages.sh PYTHON    (with requirements.txt and the package installed: the wheel takes the objects of
#                                     that build, from build/, where they are up to date)
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
folder=$PWD/build/packages
tools=$folder/tools
say() { printf '== %s\n' "$*"; }
fail() { printf 'check_packages: %s\n' "$*" >&2; exit 1; }

mkdir -p "$folder"
if ! cmp -s requirements-packages.txt "$tools/installed.txt"; then
  say "tools: twine, abi3audit, auditwheel, and no torch"
  "$python" -m venv --clear "$tools"
  "$tools/bin/python" -m pip install --quiet -r requirements-packages.txt
  cp requirements-packages.txt "$tools/installed.txt"
fi
rm -rf "$folder"/{here,elsewhere,unpacked,bare,site,site_bare}

build_sdist() { # build_sdist PYTHON FOLDER TREE
  mkdir -p "$2"
  (cd "$3" && "$1" -c 'import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])' "$2") \
    >"$2/log" 2>&1 || { cat "$2/log" >&2; fail "no sdist"; }
  mkdir "$2/unpacked"
  tar -xzf "$2"/*.tar.gz --strip-components=1 -C "$2/unpacked"
}

say "sdist: with torch and a compiler, and without"
build_sdist "$python" "$folder/here" .
tree=.
if [[ -e .git ]]; then # a copy without what earlier builds left: setuptools reads its old list of files
  tree=$folder/elsewhere/tree
  mkdir -p "$tree"
  git ls-files --cached --others --exclude-standard | while read -r file; do
    [[ ! -e $file ]] || printf '%s\n' "$file"
  done | tar -cf - -T - | tar -xf - -C "$tree"
fi
CXX=false build_sdist "$tools/bin/python" "$folder/elsewhere" "$tree"
diff -r "$folder/here/unpacked" "$folder/elsewhere/unpacked" || fail "the sdist depends on where it is made"
if [[ -e .git ]]; then # all files of the checkout, as they are, but for what CI and git are told; a link is none
  git ls-files --cached --others --exclude-standard | grep -v '^\.' | while read -r file; do
    [[ ! -f $file ]] || cmp "$file" "$folder/here/unpacked/$file" || exit 1
  done || fail "the sdist lacks files"
  (cd "$folder/here/unpacked" && find . -type f | sed 's|^\./||') | while read -r file; do
    case $file in PKG-INFO | setup.cfg | *.egg-info/*) continue ;; esac
    [[ -e $file ]] && ! git check-ignore -q "$file" || { echo "$file" >&2; exit 1; }
  done || fail "the sdist has files that are no part of the project"
fi

say "wheel: of the checkout, whose sources are those of the sdist; and of the sdist, without a compiler"
"$python" -m pip wheel --quiet --no-build-isolation --no-deps -w "$folder/here" .
CXX=false "$python" -m pip wheel --quiet --no-build-isolation --no-deps -w "$folder/bare" "$folder"/here/*.tar.gz
wheel=$(echo "$folder"/here/*-cp310-abi3-*.whl)
bare=$(echo "$folder"/bare/*-py3-none-any.whl)
[[ -e $wheel && -e $bare ]] || fail "wheels of unexpected names: $(ls "$folder"/{here,bare}/*.whl)"
"$python" -m zipfile -l "$wheel" | awk 'NR > 1 { print $1 }' >"$folder/here/contents"
grep -q '^replearn_kernels/_native\.abi3\.so$' "$folder/here/contents" || fail "the wheel lacks the C++ kernels"
if grep -vE '^replearn_kernels/([a-z_0-9]+/)*([a-z_0-9]+\.py|py\.typed|_native(_cuda)?\.abi3\.so|[a-z_]+\.(h|inl))$|\.dist-info/' \
  "$folder/here/contents" >&2; then fail "the wheel has files that are no part of the package"; fi

say "checks"
"$tools/bin/twine" check --strict "$folder"/here/*.tar.gz "$wheel" "$bare"
"$tools/bin/abi3audit" --strict --report "$wheel" >"$folder/abi3audit.json" || fail "abi3audit: $folder/abi3audit.json"
if [[ $(uname) == Linux ]]; then
  "$tools/bin/auditwheel" show "$wheel" 2>/dev/null | tee "$folder/auditwheel.txt"
  grep -q manylinux_ "$folder/auditwheel.txt" || fail "the wheel needs more of the system than C and C++"
fi

smoke() { # smoke WHEEL SITE BACKEND: a loss and its gradients, installed and in another folder
  bash scripts/venv_beside.sh "$python" "$2" --without-pip
  "$2/bin/python" -m pip install --quiet --no-deps --no-index --force-reinstall "$1"
  (cd "$2" && REPLEARN_KERNELS_CACHE="$2/cache" bin/python -I - "$3" "$2" <<'PY')
import sys, warnings
import torch
import replearn_kernels
from replearn_kernels import triton_kernels
from replearn_kernels.engine import backends, native

backend, site = sys.argv[1:]
assert all(module.__file__.startswith(site) for module in (replearn_kernels, triton_kernels)), replearn_kernels.__file__
x, y = (torch.nn.functional.normalize(torch.randn(33, 16), dim=1).requires_grad_() for _ in range(2))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loss = replearn_kernels.clip_loss(x, y, 10.0)
    loss.backward()
assert backends.resolve_backend("auto", x.device, x.dtype) == backend
assert bool(caught) == (native.why_missing() is not None) == (backend == "torch"), (caught, native.why_missing())
gradient = x.grad.clone()
x.grad = None
expected = replearn_kernels.clip_loss(x, y, 10.0, backend="eager")
expected.backward()
torch.testing.assert_close(loss, expected)
torch.testing.assert_close(x.grad, gradient)
print("clip_loss and its gradients by backend", backend)
if backend == "cpp":  # and a declared loss, of which the wheel has the sources
    labels = torch.arange(33) // 3
    of_cpp, exact = (replearn_kernels.circle_loss(x, labels, backend=name) for name in ("cpp", "eager"))
    torch.testing.assert_close(of_cpp, exact)
    print("circle_loss, compiled here")
PY
}
say "installed"
smoke "$wheel" "$folder/site" cpp
smoke "$bare" "$folder/site_bare" torch
say "packages are in order: $(basename "$wheel"), $(basename "$folder"/here/*.tar.gz)"
