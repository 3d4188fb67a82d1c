"""How the package is built: its version, and its extension, also where there is none."""

import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pybind11
import pytest
import torch

import mim4dd
from mim4dd import extension

ROOT = Path(__file__).parent.parent


def test_import_falls_back_with_one_warning():
    program = """
import importlib, warnings
original = importlib.import_module
def load(name, *rest):
    if name == "mim4dd._C":
        raise ImportError("version `GLIBC_2.38' not found (required by _C.so)")
    return original(name, *rest)
importlib.import_module = load
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from mim4dd import augment
    import torch
    y = augment.apply(torch.ones(1, 3, 4, 4), augment.AugmentParams.identity(1))
assert torch.allclose(y, torch.ones(1, 3, 4, 4))
print(*(w.message for w in caught if "mim4dd" in str(w.message)), sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (warning,) = done.stdout.strip().splitlines()
    assert "version `GLIBC_2.38' not found" in warning
    assert "reference runs instead" in warning


@pytest.mark.parametrize(
    ("error", "at_once"),
    [
        (ModuleNotFoundError("No module named 'mim4dd._C'"), 0),  # when it would have been used
        (ImportError("_C.so: undefined symbol: torch_call_dispatcher"), 1),
        (OSError("libtorch_cpu.so: cannot open shared object file"), 1),
        (RuntimeError("Tried to register an operator with the same name multiple times"), 1),
    ],
    ids=["missing", "other ABI", "no torch library", "not registered"],
)
def test_the_warning_names_the_cause(error, at_once, monkeypatch, recwarn):
    def fail(name):
        raise error

    monkeypatch.setattr("importlib.import_module", fail)
    loaded = runpy.run_path(extension.__file__)
    assert len(recwarn) == at_once
    loaded["warn_once"]()
    (warning,) = recwarn
    assert f"the compiled extension _C cannot be loaded ({error})" in str(warning.message)
    assert not loaded["available"]()


def test_losses_alone_need_no_extension_and_hear_of_none():
    program = """
import sys, warnings
sys.modules["mim4dd._C"] = None  # ends in a ModuleNotFoundError
warnings.simplefilter("error")
import mim4dd, torch
mim4dd.nce_loss(torch.ones(2, 3), torch.ones(2, 3), torch.arange(2), torch.arange(2))
params = mim4dd.augment.AugmentParams.identity(1)
mim4dd.augment.apply(torch.ones(1, 3, 4, 4), params, backend="reference")
for use in (lambda: mim4dd.networks.create("mlp", 1, 10, 8), lambda: None):
    try:
        use()
    except UserWarning as warning:
        print(warning)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot be loaded") == 1


@pytest.mark.parametrize(
    "name", ["augment/cpu_images", "normalisation/image", "convolution/tiles", "first_block/image"]
)
def test_avx2_code_shares_no_function_with_the_baseline(tmp_path, name):
    """The linker keeps one copy of a weak function: an older machine must not be left with that of AVX2."""
    compiler = shutil.which("c++")
    if compiler is None or shutil.which("nm") is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("no c++ or nm on PATH, or no AVX2")
    options = ["-std=c++20", "-O1", "-mavx2", "-mfma", "-DMIM4DD_ISA=avx2"]
    subprocess.run(
        [compiler, *options, "-c", ROOT / f"csrc/{name}.cpp", "-o", tmp_path / "avx2.o"], check=True
    )
    listed = subprocess.run(["nm", "-C", tmp_path / "avx2.o"], capture_output=True, text=True, check=True)
    weak = re.findall(r"^[0-9a-f]+ [uW] (.+)$", listed.stdout, re.MULTILINE)
    assert [function for function in weak if "mim4dd::avx2::" not in function] == []


@pytest.mark.skipif(not extension.available(), reason="the extension is not built")
@pytest.mark.parametrize(("capability", "isa"), [("default", "baseline"), ("avx2", "avx2")])
def test_code_for_older_processors_is_right(capability, isa):
    """The kernels' own tests, without torch's compiler, for which a capability is not a key of its cache."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    names = ("test_augment", "test_convolution", "test_first_block", "test_normalisation")
    options = ["-q", "-x", "-k", "not compiles and not registered and not declare"]
    program = f"""
import mim4dd, pytest, sys
print(mim4dd._C.isa())
if mim4dd._C.isa() == {isa!r}:
    sys.exit(pytest.main({[*options, *(f"tests/{name}.py" for name in names)]}))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.stdout.split()[0] != isa:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not extension.available(), reason="the extension is not built")
def test_hostile_calls_are_survived():
    """Those of `make asan`, here without AddressSanitizer."""
    command = [sys.executable, "tests/hostile.py", mim4dd._C.__file__]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "hostile calls survived" in done.stdout


def test_draws_are_compiled_to_round_their_products(tmp_path, monkeypatch):
    """Whether a compiler would fuse them otherwise depends on how it arranges the loop."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    if None in map(shutil.which, ("cmake", "ninja", "c++")):
        pytest.skip("no cmake, ninja or c++ on PATH")
    paths = [
        f"-DMIM4DD_OUTPUT_DIR={tmp_path}",
        f"-DMIM4DD_TORCH={Path(torch.__file__).parent}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    options = ["-GNinja", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    subprocess.run(["cmake", ROOT, *options, *paths], cwd=tmp_path, check=True, capture_output=True)
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    (command,) = (each["command"] for each in commands if each["file"].endswith("csrc/draw/ops.cpp"))
    assert "-ffp-contract=off" in command.split()


@pytest.mark.parametrize("source", ["augment", "draw"])
def test_cuda_kernels_compile_without_spills(tmp_path, record_property, source):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    options = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (75, 80, 90)]
    options += ["--threads=2", "-Xptxas=-v", "-Xcompiler=-Wall,-Wextra", "-Werror=all-warnings", "-std=c++20"]
    include = Path(torch.__file__).parent / "include"
    done = subprocess.run(
        [nvcc, *options, f"-I{include}", "-c", ROOT / f"csrc/{source}/cuda.cu", "-o", tmp_path / "cuda.o"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels = re.findall(
        r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    assert {architecture for _, architecture, _, _ in kernels} == {"sm_75", "sm_80", "sm_90"}
    for name, architecture, spilled, registers in kernels:
        record_property(f"{name} {architecture}", f"{registers} registers, {spilled} bytes spilled")
        assert spilled == "0", f"{name} spills on {architecture}, using {registers} registers"


def test_the_operators_register_for_cuda():
    """The same sources as for the CPU; only a torch with CUDA can link and load it."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no c++ on PATH")
    include = [Path(torch.__file__).parent / "include", pybind11.get_include(), sysconfig.get_path("include")]
    macros = ["MIM4DD_CUDA", "USE_CUDA", "TORCH_TARGET_VERSION=0x020a000000000000"]
    options = ["-std=c++20", "-fsyntax-only", *(f"-D{m}" for m in macros), *(f"-I{path}" for path in include)]
    sources = [ROOT / "csrc/module.cpp", *(ROOT / f"csrc/{name}/ops.cpp" for name in ("augment", "draw"))]
    done = subprocess.run([compiler, *options, *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("nvcc", "torch_cuda", "built"),
    [("12.8", "12.6", True), ("13.0", "12.8", False), ("11.5", "11.8", False), ("12.8", None, False)],
)
def test_cuda_kernels_are_built_by_the_nvcc_of_torch(monkeypatch, capsys, tmp_path, nvcc, torch_cuda, built):
    program = tmp_path / "nvcc"
    program.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {nvcc}, V{nvcc}.1'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("MIM4DD_CUDA", raising=False)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    wants_cuda = runpy.run_path(str(ROOT / "setup.py"))["wants_cuda"]
    capsys.readouterr()
    assert wants_cuda() is built
    said = capsys.readouterr().err
    assert ("MIM4DD_CUDA=1 builds them in any case" in said) is (torch_cuda is not None and not built)
    monkeypatch.setenv("MIM4DD_CUDA", "1")
    assert wants_cuda()


def test_two_libraries_are_built_in_two_folders(tmp_path):
    """`build_ext --parallel` builds both at once, and each begins by emptying its folder's cache."""
    program = """
import runpy, subprocess, sys
subprocess.run = lambda command, cwd=None, **_: print(cwd)
sys.argv = ["setup.py", "-q", "build_ext", "--build-temp", sys.argv[1], "--build-lib", sys.argv[1]]
runpy.run_path("setup.py", run_name="__main__")
"""
    command = [sys.executable, "-c", program, tmp_path]
    environment = {**os.environ, "MIM4DD_CUDA": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert len(set(done.stdout.split())) == 2


@pytest.mark.parametrize(("missing", "named"), [("a compiler", "cmake"), ("pybind11", "pybind11")])
def test_where_it_cannot_be_built_the_build_says_what_to_do(tmp_path, missing, named):
    hidden = "" if missing == "a compiler" else f"sys.modules[{missing!r}] = None; "
    program = f"import runpy, sys; {hidden}runpy.run_path('setup.py', run_name='__main__')"
    options = ["-q", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path]
    environment = {**os.environ, "PATH": str(tmp_path), "MIM4DD_CUDA": "0"}
    command = [sys.executable, "-c", program, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(f"mim4dd._C cannot be built .*{named}.*; it needs", done.stderr)
    assert "pip install 'setuptools>=77' cmake ninja pybind11" in done.stderr
    assert "MIM4DD_NO_EXT=1 installs without it" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def copied(tmp_path):
    """A copy of what the package is built from, and how to call a hook of its build there."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("mim4dd", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))

    def call(hook, **environment):
        program = f"from setuptools import build_meta; build_meta.{hook}('dist')"
        command = [sys.executable, "-c", program]
        environment = {**os.environ, **environment}
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)

    (tmp_path / "dist").mkdir()
    return tmp_path, call


def test_the_archive_of_the_sources_holds_what_a_build_takes(copied):
    folder, call = copied
    call("build_sdist", MIM4DD_CUDA="0")
    (archive,) = folder.glob("dist/*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert {"CMakeLists.txt", "setup.py", "kernels/wide.py", *sources} <= names


def test_an_installation_without_the_extension_leaves_no_older_one(copied):
    folder, call = copied
    for name in ("_C", "_C_cuda"):
        (folder / f"mim4dd/{name}.cpython-311.so").touch()
    call("build_editable", MIM4DD_NO_EXT="1")
    assert not [*folder.glob("mim4dd/*.so")]


@pytest.mark.skipif(extension.available("cuda") or not extension.available(), reason="built, or nothing is")
@pytest.mark.parametrize("count", [0, 1])
def test_the_cuda_half_is_missed_only_where_there_is_a_gpu(count, monkeypatch, recwarn):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    loaded = runpy.run_path(extension.__file__)
    assert not recwarn
    loaded["warn_once"]()
    told = [str(warning.message) for warning in recwarn]
    assert len(told) == count
    assert all("_C_cuda cannot be loaded" in text and "for augmentation on a GPU" in text for text in told)


def test_what_is_installed_has_the_version_of_the_package():
    command = [sys.executable, "setup.py", "-q", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == mim4dd.__version__


def test_sources_that_are_not_installed_do_without_the_kernels(tmp_path):
    (tmp_path / "mim4dd").symlink_to(ROOT / "mim4dd")
    program = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in str(finder)]
import mim4dd, torch
rows, labels = torch.eye(3), torch.arange(3)
mim4dd.nce_loss(rows, rows, labels, labels)
try:
    mim4dd.nce_loss(rows, rows, labels, labels, backend="fused")
except RuntimeError as error:
    print(error)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "triton is not installed" in done.stdout or "imported from its source folder" in done.stdout
