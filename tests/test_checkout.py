"""What Python, and type checkers, find in a checkout: before it was built, and where it is installed as README says."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from replearn_kernels.engine import native

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("replearn_kernels", "triton_kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")

needs_link = pytest.mark.skipif(
    not (ROOT / "replearn_kernels" / "triton_kernels").is_symlink(), reason="a tree without links: an sdist, or Windows"
)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the tree in which nothing was built."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def run(*command, cwd, **environment):
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


WHERE = """
import torch, warnings, replearn_kernels as rk
print(rk.__file__)
try:
    from replearn_kernels import triton_kernels
    print(triton_kernels.__file__)
except ModuleNotFoundError as error:
    assert error.name == "triton", error
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    rk.clip_loss(torch.eye(3), torch.eye(3), 1.0)
print(*(warning.message for warning in caught))
"""


@needs_link
def test_a_checkout_that_was_not_built_has_all_modules_and_says_what_it_is(checkout):
    package, *kernels, warning = run(sys.executable, "-c", WHERE, cwd=checkout).splitlines()
    assert Path(package) == checkout / "replearn_kernels" / "__init__.py"
    assert all(Path(path) == checkout / "replearn_kernels" / "triton_kernels" / "__init__.py" for path in kernels)
    assert f"no _native.*so in {checkout / 'replearn_kernels'}; {checkout} is a source checkout" in warning
    assert f"pip install --no-build-isolation -e {checkout}`" in warning and "compiler was found" not in warning


def test_what_was_installed_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "_PACKAGE", tmp_path / "replearn_kernels")
    reason = "no working C++ compiler was found at installation"
    assert native._load_cpu() == f"it was not built: no _native.*so in {tmp_path / 'replearn_kernels'}; {reason}"


@needs_link
def test_pyright_and_python_find_what_is_installed_as_documented(checkout, tmp_path):
    pytest.importorskip("basedpyright")
    (options,) = re.findall(r"`pip install (.*?editable_mode=.*?)`", (ROOT / "README.md").read_text())
    venv, user = tmp_path / "venv", tmp_path / "user"
    run("bash", ROOT / "scripts" / "venv_beside.sh", sys.executable, venv, "--without-pip", cwd=tmp_path)
    python = venv / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", *options.split(), cwd=checkout, CXX="false")
    user.mkdir()
    usage = "from replearn_kernels import clip_loss\nfrom replearn_kernels.triton_kernels.configs import Config\n"
    usage += "reveal_type(clip_loss)\nreveal_type(Config.warps)\n"
    (user / "usage.py").write_text(usage)
    (user / "pyrightconfig.json").write_text(json.dumps({"include": ["usage.py"], "typeCheckingMode": "standard"}))
    said = run(sys.executable, "-m", "basedpyright", "--pythonpath", python, cwd=user)
    assert "0 errors" in said and "logit_scale: float | Tensor" in said and '"Config.warps" is "int"' in said
    package, *kernels, _ = run(python, "-c", WHERE, cwd=user).splitlines()
    assert all(Path(path).is_relative_to(checkout) for path in (package, *kernels))
