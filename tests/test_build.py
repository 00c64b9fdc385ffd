"""setup.py: what is built where, with fake compilers; and what the package says of libraries that do not load."""

import importlib.util
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from replearn_kernels.engine import mining, native

ROOT = Path(__file__).parents[1]
CUDA_13 = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]
CUDA_12_6 = [(5, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0)]

# Tells its version, and makes objects of nothing; unless {fails}.
NVCC = """#!/bin/sh
case "$*" in
  *--list-gpu-arch*) printf 'compute_80\\ncompute_90\\ncompute_100\\n'; exit ;;
  *--version*) echo 'Cuda compilation tools, release {version}, V{version}.0'; exit ;;
esac
{fails}
while [ "$1" != -o ]; do shift; done
echo | c++ -x c++ -fPIC -c - -o "$2"
"""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("c++") is None, reason="needs Linux and a C++ compiler"
)


@pytest.fixture
def setup(monkeypatch):
    """setup.py as a module, on a machine without a GPU whose user has set nothing."""
    for name in ("TORCH_CUDA_ARCH_LIST", "REPLEARN_KERNELS_CUDA", "CXX", "CC"):
        monkeypatch.setenv(name, "")  # so that what setup.py sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    spec = importlib.util.spec_from_file_location("setup_of_replearn_kernels", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(monkeypatch, tmp_path):
    """make(...): a CUDA toolkit, and a torch that was built with CUDA 13.0."""

    def make(version="13.0", fails="", libraries=("cudart", "c10_cuda", "torch_cuda")):
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text(NVCC.format(version=version, fails=fails))
        nvcc.chmod(0o755)
        (tmp_path / "lib64").mkdir()
        for name in libraries:
            path = tmp_path / "lib64" / f"lib{name}.so"
            subprocess.run(["c++", "-shared", "-x", "c++", "/dev/null", "-o", path], check=True)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))

    return make


def with_working_compiler(setup, monkeypatch):
    """So that a test of CUDA does not wait for the probe of C++."""
    probe = setup.why_not_built
    monkeypatch.setattr(setup, "why_not_built", lambda *a: None if a[1] == ".cpp" else probe(*a))


class TestArchitectures:
    @pytest.mark.parametrize(
        "supported, visible, expected",
        [
            (CUDA_13, [], "8.0;9.0;10.0+PTX"),
            (CUDA_12_6, [], "8.0;9.0+PTX"),
            (CUDA_13, [(8, 6), (8, 6)], "8.0;8.6;9.0;10.0+PTX"),
            (CUDA_13, [(12, 0)], "8.0;9.0;10.0;12.0+PTX"),
            (CUDA_13, [(7, 5)], "7.5;8.0;9.0;10.0+PTX"),
            (CUDA_12_6, [(12, 0)], "8.0;9.0+PTX"),  # such a GPU compiles the PTX
        ],
    )
    def test_chosen_without_the_user(self, setup, supported, visible, expected):
        assert setup.architectures(supported, visible) == expected

    def test_torch_takes_them_where_no_gpu_is(self, setup, toolkit):
        """By itself it fails there, with an IndexError."""
        toolkit()
        assert setup.why_no_cuda() is None
        flags = cpp_extension._get_cuda_arch_flags()
        targets = [f"arch=compute_{number},code=sm_{number}" for number in (80, 90, 100)]
        assert sorted(flags) == sorted(f"-gencode={t}" for t in [*targets, "arch=compute_100,code=compute_100"])

    def test_of_the_user_is_kept(self, setup, toolkit, monkeypatch):
        toolkit()
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.9")
        assert setup.why_no_cuda() is None and os.environ["TORCH_CUDA_ARCH_LIST"] == "8.9"


class TestLibraries:
    def test_two_where_cuda_works(self, setup, toolkit, monkeypatch):
        toolkit()
        with_working_compiler(setup, monkeypatch)
        cpu, cuda = setup.extensions()
        assert (cpu.name, cuda.name) == ("replearn_kernels._native", "replearn_kernels._native_cuda")
        assert len(cpu.sources) > 10 and all(source.endswith(".cpp") for source in cpu.sources)
        assert [Path(source).name for source in cuda.sources] == ["mine_triplets.cu"]
        assert not any("cuda" in library for library in cpu.libraries) and "torch_cuda" in cuda.libraries
        for extension in (cpu, cuda):  # for every Python and torch from 2.10 on, and small
            assert extension.py_limited_api and "-Wl,-s" in extension.extra_link_args
            assert ("TORCH_TARGET_VERSION", "0x020a000000000000") in extension.define_macros

    @pytest.mark.parametrize(
        "options, reason",
        [
            (dict(libraries=["cudart", "c10_cuda"]), "LinkError"),
            (dict(fails="exit 1"), "Error compiling objects"),
            (dict(version="12.8"), "detected CUDA version .* mismatches .*12.8"),
        ],
        ids=["does not link", "does not compile", "of another CUDA than torch's"],
    )
    def test_cuda_that_does_not_work_costs_cuda_alone(self, setup, toolkit, monkeypatch, capfd, options, reason):
        toolkit(**options)
        with_working_compiler(setup, monkeypatch)
        assert [extension.name for extension in setup.extensions()] == ["replearn_kernels._native"]
        assert "no CUDA kernels: " in capfd.readouterr().err
        monkeypatch.setenv("REPLEARN_KERNELS_CUDA", "1")
        with pytest.raises(SystemExit, match=f"(?s)REPLEARN_KERNELS_CUDA=1, but no CUDA kernels.*{reason}"):
            setup.extensions()

    def test_cuda_left_out(self, setup, toolkit, monkeypatch):
        toolkit()
        monkeypatch.setenv("REPLEARN_KERNELS_CUDA", "0")
        assert setup.why_no_cuda() == "REPLEARN_KERNELS_CUDA=0"

    def test_no_nvcc(self, setup, monkeypatch, tmp_path):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
        assert "set CUDA_HOME" in setup.why_no_cuda()
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
        assert "nvcc does not run" in setup.why_no_cuda()

    @pytest.mark.parametrize("broken", ["compiler", "linker"])
    def test_cpp_that_does_not_work(self, setup, monkeypatch, capfd, broken):
        if broken == "compiler":
            monkeypatch.setenv("CXX", "false")
        else:
            monkeypatch.setattr(setup, "LINK_FLAGS", ["-lno_such_library"])
            monkeypatch.setattr(setup, "CPP_PROBE", "int probe;\n")
        assert setup.extensions() == []
        assert "no working C++ compiler, installing without the C++ kernels" in capfd.readouterr().err
        monkeypatch.setenv("REPLEARN_KERNELS_CUDA", "1")
        with pytest.raises(SystemExit, match="(?s)REPLEARN_KERNELS_CUDA=1, but there is no working C.. compiler"):
            setup.extensions()

    def test_a_compiler_that_works_is_found_to(self, setup):
        assert setup.why_not_built(setup.cpp_extension, ".cpp", setup.CPP_PROBE) is None

    def test_own_cuda_sources_that_fail_are_an_error(self, setup, monkeypatch, capfd):
        """Where nvcc works, that is for the user to decide, who is told how."""

        def fail(self, extension):
            raise RuntimeError("nvcc: error")

        build = setup.build_command()
        monkeypatch.setattr(build.__mro__[1], "build_extension", fail, raising=False)
        command = build(setup.setuptools.Distribution())
        for name, told in (("_native", False), ("_native_cuda", True)):
            with pytest.raises(RuntimeError, match="nvcc: error"):
                command.build_extension(setup.setuptools.Extension(f"replearn_kernels.{name}", []))
            assert ("REPLEARN_KERNELS_CUDA=0 installs without them" in capfd.readouterr().err) == told


class TestTools:
    """Too old or missing ones are told of in a sentence, before setuptools or pip says something else."""

    def check(self, setup, monkeypatch, command="dist_info"):
        monkeypatch.setattr(sys, "argv", ["setup.py", command])
        setup.check_tools()

    def test_those_at_hand(self, setup, monkeypatch):
        self.check(setup, monkeypatch)

    def test_old_setuptools(self, setup, monkeypatch):
        monkeypatch.setattr(setup.setuptools, "__version__", "65.5.0")
        with pytest.raises(SystemExit, match="setuptools >= 77, found 65.5.0: pip install --upgrade setuptools"):
            self.check(setup, monkeypatch)

    def test_old_torch(self, setup, monkeypatch):
        monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
        with pytest.raises(SystemExit, match=r"torch >= 2.10, found 2.9.1\+cpu.*--no-build-isolation"):
            self.check(setup, monkeypatch)

    def test_no_torch(self, setup, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch", None)
        with pytest.raises(SystemExit, match="needs torch >= 2.10 .*install that first.*--no-build-isolation"):
            self.check(setup, monkeypatch)

    @pytest.mark.parametrize("command", ["sdist", "egg_info"])
    def test_an_sdist_needs_no_torch(self, setup, monkeypatch, command):
        monkeypatch.setitem(sys.modules, "torch", None)
        self.check(setup, monkeypatch, command)
        assert setup.arguments() == {}


def test_sources_know_only_what_torch_2_10_has():
    """Of torch 2.13's names; that target version 2.10 hides the others, the compiler sees to."""
    sources = [path for path in ROOT.glob("csrc/**/*") if path.is_file()]
    assert len(sources) > 30
    assert [path for path in sources if "STABLE_TORCH_ERROR_CODE_CHECK" in path.read_text()] == []


@pytest.mark.skipif(not native.available(), reason=str(native.why_missing()))
class TestLoading:
    def test_library_is_stripped(self):
        (library,) = (ROOT / "replearn_kernels").glob("_native.*so")
        assert library.stat().st_size < 2e6

    def test_broken_cuda_library_leaves_the_cpu_kernels(self, tmp_path):
        """In a package of its own, with a file in the library's place that is none."""
        package = tmp_path / "replearn_kernels"
        ignore = shutil.ignore_patterns("_native_cuda*", "__pycache__")
        shutil.copytree(ROOT / "replearn_kernels", package, ignore=ignore)
        (package / "_native_cuda.abi3.so").write_bytes(b"no library")
        program = (
            "import torch, replearn_kernels as rk; from replearn_kernels.engine import native\n"
            "x = torch.eye(3, requires_grad=True)\n"
            "rk.clip_loss(x, x, 1., backend='cpp').backward(); print(rk.__file__, native.why_not_on_cuda())"
        )
        result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert str(package) in result.stdout
        assert "_native_cuda.abi3.so could not be loaded" in result.stdout and "file too short" in result.stdout

    def test_cause_of_a_failed_load(self, monkeypatch, tmp_path):
        """What the dynamic linker says, which torch's own error leaves out."""
        (tmp_path / "_native.abi3.so").write_bytes(b"no library")
        monkeypatch.setattr(native, "_PACKAGE", tmp_path)
        assert native._load_cpu() == f"_native.abi3.so could not be loaded: {tmp_path}/_native.abi3.so: file too short"
        monkeypatch.setattr(native, "_missing", native._load_cpu())
        assert native._load_cuda() == native._missing  # nothing to implement

    def test_miner_on_a_gpu(self, monkeypatch):
        """Not built: plain PyTorch, as documented. Broken: with a warning, or by name an error, that says why."""
        gpu = torch.device("cuda")
        monkeypatch.setattr(native, "_missing_cuda", "_native_cuda.abi3.so could not be loaded: no libcudart.so.13")
        mining._without_cuda_kernels.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert mining.resolve_miner("auto", gpu) == "torch"
        monkeypatch.setattr(native, "_cuda_was_built", True)
        mining._without_cuda_kernels.cache_clear()
        with pytest.warns(UserWarning, match="no libcudart.so.13"):
            assert mining.resolve_miner("auto", gpu) == "torch"
        with pytest.raises(RuntimeError, match="backend='cuda' is not available: .*no libcudart.so.13"):
            mining.resolve_miner("cuda", gpu)
        monkeypatch.setattr(native, "_missing_cuda", None)
        assert mining.resolve_miner("auto", gpu) == "cuda"
        mining._without_cuda_kernels.cache_clear()
