"""What an installation leaves alone, and what it is told: torch, its triton, the environment it is made from."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"


def python(*command, path=None):
    """Its output; ``path``: a folder whose packages are found first."""
    program = "import sys, runpy; sys.path[:0], sys.argv = sys.argv[1:2], sys.argv[2:]\n"
    program += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", program, path, *command]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def make_torch(folder, requirements=(), cuda=None, triton=False):
    """A torch that says what it needs, and no more."""
    for name in ("torch", "triton") if triton else ("torch",):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"class version:\n    cuda, hip = {cuda!r}, None\n")
    metadata = folder / "torch-2.11.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: torch", "Version: 2.11.0", *(f"Requires-Dist: {r}" for r in requirements)]
    metadata.write_text("\n".join(lines) + "\n")


class TestRequirements:
    @pytest.mark.parametrize(
        "torch, ours",
        [
            (dict(requirements=["sympy", 'triton==3.6.0; platform_system == "Linux"'], cuda="13.0"), False),
            (dict(requirements=["pytorch-triton==3.6.0+git"], cuda="13.0"), False),
            (dict(cuda="13.1", triton=True), False),
            (dict(requirements=["sympy"]), True),
        ],
        ids=["names it", "names a build of its own", "in a container", "of a CPU"],
    )
    def test_triton_of_a_torch_stays(self, tmp_path, torch, ours):
        make_torch(tmp_path, **torch)
        needed = python(SCRIPTS / "requirements_beside_torch.py", ROOT / "requirements.txt", path=tmp_path)
        given = (ROOT / "requirements.txt").read_text().splitlines()
        others = [line for line in given if not line.startswith("triton==")]
        assert len(others) < len(given) and needed == (given if ours else others)

    def test_shim_builds_with_the_pinned_pybind11(self):
        """Not with the copy that torch has for itself."""
        assert re.search(r"^pybind11==\d", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
        assert "torch" not in (ROOT / "tests" / "cuda_shim" / "build.py").read_text()


class TestEnvironment:
    def test_beside_another(self, tmp_path):
        """It finds what that one finds, virtual or not; what is installed in it comes first."""
        outer, inner = tmp_path / "outer", tmp_path / "inner"
        for base, venv in ((sys.executable, outer), (outer / "bin" / "python", inner)):
            subprocess.run(["bash", SCRIPTS / "venv_beside.sh", base, venv, "--without-pip"], check=True)
        (packages,) = inner.glob("lib/*/site-packages")
        (packages / "psutil.py").write_text("__version__ = 'inner'\n")
        program = "import importlib.util as u, psutil; print(u.find_spec('torch').origin, psutil.__version__)"
        found = subprocess.run([inner / "bin" / "python", "-c", program], capture_output=True, text=True, check=True)
        torch = subprocess.run(
            [sys.executable, "-c", "import importlib.util as u; print(u.find_spec('torch').origin)"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert found.stdout.split() == [torch.stdout.strip(), "inner"]

    @pytest.mark.parametrize("has_torch", [False, True])
    def test_torch_of_the_makefile(self, tmp_path, has_torch):
        """Options may follow its version; where there is one already, none is installed."""
        log = tmp_path / "log"
        fake = tmp_path / "python"
        # A python that makes venvs of itself, and notes what pip is asked for.
        fake.write_text(
            f"""#!/bin/sh
case "$*" in
  *"-m venv"*) for venv; do case $venv in -*|venv) ;; *) mkdir -p $venv/bin; cp $0 $venv/bin/python ;; esac; done ;;
  *"-m pip"*) for word; do echo "$word"; done >>{log}; echo >>{log} ;;
  *"import sys, torch"*) exit {int(not has_torch)} ;;
  *purelib*) echo {tmp_path} ;;
esac
"""
        )
        fake.chmod(0o755)
        torch = "torch==2.13.0 --index-url https://a.b/c"
        command = ["bash", SCRIPTS / "setup_venv.sh", fake, tmp_path / "venv", torch]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        calls = [call.split("\n") for call in log.read_text().strip().split("\n\n")]
        asked = [call for call in calls if "torch==2.13.0" in call]
        assert asked == ([] if has_torch else [["-m", "pip", "install", "--quiet", *torch.split()]])


class TestDocumentation:
    @pytest.mark.parametrize("name", ["README.md", "bench/README.md", "examples/README.md"])
    def test_install_lines(self, name):
        """The tree is installed with the torch at hand, by a setuptools that reads its pyproject.toml."""
        lines = re.findall(r"^pip install (.*?)(?:\s+#.*)?$", (ROOT / name).read_text(), re.MULTILINE)
        trees = [line for line in lines if re.search(r"-e ", line)]
        assert trees and all("--no-build-isolation" in line for line in trees)
        assert lines[lines.index(trees[0]) - 1] == '"setuptools>=77,<82" ninja numpy'

    def test_building_asks_for_no_torch(self):
        """An isolated build would download one."""
        requires = re.search(r"^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
        assert "torch" not in requires and "setuptools>=77" in requires
