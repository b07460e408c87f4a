"""The build: how the CUDA part is chosen, what the module links. Configures only, compiles nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sidp_runtime import _C

ROOT = Path(__file__).resolve().parents[2]
BIN_DIR = Path(sys.executable).parent
TOOL_PATH = os.pathsep.join([str(BIN_DIR), os.environ.get("PATH", os.defpath)])
CMAKE = shutil.which("cmake", path=TOOL_PATH)

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not (ROOT / "CMakeLists.txt").is_file(), reason="tests are not run from a source tree"),
]


def configure(folder: Path, *options: str, cuda_home: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A configure step of the C++ core alone."""
    assert CMAKE is not None, "cmake is part of the test extra"
    env = {name: value for name, value in os.environ.items() if name not in ("SIDP_CUDA_ROOT", "CUDA_HOME")}
    env["PATH"] = TOOL_PATH
    if cuda_home is not None:
        env["CUDA_HOME"] = str(cuda_home)
    command = [
        CMAKE,
        "-S",
        str(ROOT),
        "-B",
        str(folder / "build"),
        "-G",
        "Ninja",
        "-DSIDP_BUILD_BINDINGS=OFF",
    ]
    command += [f"-DPython_EXECUTABLE={sys.executable}", *options]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)


def toolkit(folder: Path, packed_version: int) -> Path:
    (folder / "include").mkdir(parents=True)
    (folder / "include" / "cuda.h").write_text(f"#define CUDA_VERSION {packed_version}\n")
    return folder


def test_cuda_off_is_off(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DSIDP_WITH_CUDA=OFF", cuda_home=toolkit(tmp_path / "cuda", 13000))
    assert done.returncode == 0, done.stderr
    assert "CUDA part: no (SIDP_WITH_CUDA=OFF)" in done.stdout


def test_cuda_auto_takes_what_is_there_and_says_which(tmp_path: Path) -> None:
    home = toolkit(tmp_path / "cuda", 12090)
    done = configure(tmp_path, "-DSIDP_WITH_CUDA=AUTO", cuda_home=home)
    assert done.returncode == 0, done.stderr
    assert f"CUDA part: yes, CUDA 12.9 headers from CUDA_HOME ({home}/include)" in done.stdout


def test_cuda_auto_configures_on_any_machine(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DSIDP_WITH_CUDA=AUTO")
    assert done.returncode == 0, done.stderr
    assert re.search(r"CUDA part: (yes, CUDA \d+\.\d+ headers from|no \(no CUDA headers found\))", done.stdout)


def test_explicit_root_comes_first(tmp_path: Path) -> None:
    root, home = toolkit(tmp_path / "root", 13020), toolkit(tmp_path / "home", 12090)
    done = configure(tmp_path, "-DSIDP_WITH_CUDA=ON", f"-DSIDP_CUDA_ROOT={root}", cuda_home=home)
    assert done.returncode == 0, done.stderr
    assert "CUDA 13.2 headers from SIDP_CUDA_ROOT" in done.stdout


@pytest.mark.parametrize("with_cuda", ["ON", "AUTO"])
def test_explicit_root_without_headers_is_an_error(tmp_path: Path, with_cuda: str) -> None:
    root, home = tmp_path / "bogus", toolkit(tmp_path / "home", 13000)
    done = configure(tmp_path, f"-DSIDP_WITH_CUDA={with_cuda}", f"-DSIDP_CUDA_ROOT={root}", cuda_home=home)
    assert done.returncode != 0
    assert f"no {root}/include/cuda.h" in done.stderr


def test_headers_before_cuda_12_are_refused(tmp_path: Path) -> None:
    root = toolkit(tmp_path / "old", 11080)
    done = configure(tmp_path, "-DSIDP_WITH_CUDA=ON", f"-DSIDP_CUDA_ROOT={root}")
    assert done.returncode != 0
    assert "CUDA 11.8" in done.stderr
    assert "12.0 or later" in " ".join(done.stderr.split())


def test_unknown_choice_is_an_error(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DSIDP_WITH_CUDA=maybe")
    assert done.returncode != 0
    assert "SIDP_WITH_CUDA=maybe" in done.stderr


def test_module_links_neither_driver_nor_torch_nor_nvshmem() -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf (binutils) is not installed")
    assert _C.__file__ is not None
    done = subprocess.run([readelf, "-d", _C.__file__], capture_output=True, text=True, check=True, timeout=60)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", done.stdout)
    assert any(name.startswith("libc.so") for name in needed)
    for banned in ("libcuda", "libcudart", "libtorch", "libc10", "libnvshmem", "libpython"):
        assert not [name for name in needed if name.startswith(banned)]


def test_module_exports_its_entry_point_alone() -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf (binutils) is not installed")
    assert _C.__file__ is not None
    command = [readelf, "--dyn-syms", "--wide", _C.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    rows = [line.split() for line in done.stdout.splitlines()]
    # the type information of enums is exported whatever the visibility: functions are what counts
    ours = [row[7] for row in rows if len(row) > 7 and row[3] == "FUNC" and row[6] != "UND" and "sidp" in row[7]]
    assert ours == []


def test_no_framework_header_in_the_public_headers() -> None:
    banned = re.compile(r'#include [<"](Python\.h|pybind11|torch/|ATen/|c10/|nvshmem|cuda)')
    for header in sorted((ROOT / "include").rglob("*.hpp")):
        assert not banned.search(header.read_text()), header
