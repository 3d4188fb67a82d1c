"""Builds the extension with CMake; everything else about the package is in pyproject.toml.

MIM4DD_NO_EXT=1   build no extension: a pure Python package that runs the PyTorch reference
MIM4DD_CUDA=0|1   build without or with the CUDA kernels; default: with, where a CUDA torch and its nvcc are
CMAKE_ARGS="..."  passed to CMake
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def wants_cuda() -> bool:
    if "MIM4DD_CUDA" in os.environ:
        return os.environ["MIM4DD_CUDA"] == "1"
    nvcc = shutil.which("nvcc")
    if not nvcc or not find_spec("torch"):
        return False
    import torch

    if torch.version.cuda is None:
        return False
    # Another major version may ask for a newer driver than torch does; one before 12 knows no C++20.
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.", said)
    wanted = int(torch.version.cuda.split(".")[0])
    if found and 12 <= int(found[1]) == wanted:
        return True
    version = f"CUDA {found[1]}" if found else "an unknown version"
    sys.stderr.write(
        f"Augmentation gets no CUDA kernels: {nvcc} is of {version}, torch of CUDA {wanted}; expected the "
        "same, from 12 on. MIM4DD_CUDA=1 builds them in any case.\n"
    )
    return False


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        # Right for wheels, `build_ext --inplace` and editable installs alike.
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / ext.name  # its own: `--parallel` builds several at once
        build.mkdir(parents=True, exist_ok=True)
        try:
            # Imported here, not above: reading the package's metadata must work without them.
            import pybind11
            import torch

            configure = [
                "cmake",
                str(Path(__file__).resolve().parent),
                "--fresh",  # what an earlier build noted may be gone, such as the ninja of an isolated one
                "-GNinja",
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DMIM4DD_OUTPUT_DIR={target.parent}",
                f"-DMIM4DD_CUDA={'ON' if ext.name.endswith('_cuda') else 'OFF'}",
                f"-DMIM4DD_TORCH={Path(torch.__file__).parent}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ]
            target_of = ["cmake", "--build", ".", "--target", ext.name.split(".")[-1]]
            # The environment's own CMake and Ninja go first, also where it is not activated.
            path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
            for command in (configure, target_of):
                subprocess.run(command, cwd=build, env={**os.environ, "PATH": path}, check=True)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            sys.exit(
                f"{ext.name} cannot be built ({error}); it needs torch, a C++20 compiler, and "
                "pip install 'setuptools>=77' cmake ninja pybind11. "
                "MIM4DD_NO_EXT=1 installs without it: the PyTorch reference runs, slower."
            )


names = []
if os.environ.get("MIM4DD_NO_EXT") != "1":
    names = ["mim4dd._C", *(["mim4dd._C_cuda"] if wants_cuda() else [])]
if "editable_wheel" in sys.argv:
    # What an earlier build left there would be imported all the same.
    for old in Path(__file__).parent.glob("mim4dd/_C*.so"):
        if f"mim4dd.{old.name.split('.')[0]}" not in names:
            old.unlink()
setup(ext_modules=[Extension(name, sources=[]) for name in names], cmdclass={"build_ext": CMakeBuild})
