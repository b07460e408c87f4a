"""Builds the C++ part with CMake and places it as ``sidp_runtime._C``; all metadata is in pyproject.toml.

Environment: ``SIDP_WITH_CUDA`` (AUTO, ON or OFF), ``SIDP_CUDA_ROOT``, ``CMAKE_ARGS`` (more ``-D`` options),
``CMAKE_BUILD_PARALLEL_LEVEL`` (jobs).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# cmake and ninja of this interpreter's environment come first, even when it was not activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def cmake_options() -> list[str]:
    """Options of the configure step. Paths are given anew each time: a build isolated by pip moves them."""
    ninja = shutil.which("ninja")
    options = [
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DSIDP_BUILD_BINDINGS=ON",
        "-DSIDP_BUILD_TESTS=OFF",
        f"-DSIDP_WITH_CUDA={os.environ.get('SIDP_WITH_CUDA', 'AUTO')}",
        f"-DSIDP_CUDA_ROOT={os.environ.get('SIDP_CUDA_ROOT', '')}",
    ]
    return [*options, f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else options


def belongs_elsewhere(cache: Path) -> bool:
    """True when the build folder was made for another checkout (moved, or mounted under another path)."""
    if not cache.is_file():
        return False
    return f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text(encoding="utf-8")


class CMakeBuild(build_ext):
    """Runs CMake in build/cmake-<python>-<platform>, which is kept so that the next build is incremental."""

    def build_extension(self, ext: Extension) -> None:
        target_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        configure = ["cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", *cmake_options()]
        if belongs_elsewhere(build_dir / "CMakeCache.txt"):
            configure.append("--fresh")
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build_dir)], check=True)
        install = ["cmake", "--install", str(build_dir), "--component", "python", "--prefix", str(target_dir)]
        subprocess.run(install, check=True)


# bench/ stays a top-level folder of the repository and is installed as sidp_runtime.bench.
bench = ["sidp_runtime.bench", *(f"sidp_runtime.bench.{name}" for name in find_packages("bench"))]

setup(
    packages=[*find_packages(include=["sidp_runtime", "sidp_runtime.*"]), *bench],
    package_dir={"sidp_runtime": "sidp_runtime", "sidp_runtime.bench": "bench"},
    package_data={
        "sidp_runtime": ["py.typed", "*.pyi"],
        "sidp_runtime.planner": ["*.json"],
        "sidp_runtime.bench": ["*.jsonl", "*.md"],
    },
    ext_modules=[Extension("sidp_runtime._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
