"""Builds the extension with CMake; everything else about the package is in pyproject.toml.

MIM4DD_NO_EXT=1   build no extension: a pure Python package that runs the PyTorch reference
CMAKE_ARGS="..."  passed to CMake
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        # Imported here, not above: reading the package's metadata must work without them.
        import pybind11
        import torch

        # Right for wheels, `build_ext --inplace` and editable installs alike.
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            str(Path(__file__).resolve().parent),
            "-GNinja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DMIM4DD_OUTPUT_DIR={target.parent}",
            f"-DMIM4DD_TORCH={Path(torch.__file__).parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        subprocess.run(configure, cwd=build, check=True)
        subprocess.run(["cmake", "--build", "."], cwd=build, check=True)


if os.environ.get("MIM4DD_NO_EXT") == "1":
    setup()
else:
    setup(ext_modules=[Extension("mim4dd._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
