"""Tiers: a test belongs to the folder that it lies in, and carries that folder's marker."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TIERS = ("unit", "conformance", "multiproc", "faults", "integration", "gpu")


def tier_of(path: Path) -> str:
    """The tier of a test file; ``UsageError`` if it lies in none."""
    tier = path.relative_to(TESTS).parts[0]
    if tier not in TIERS:
        raise pytest.UsageError(f"{path} lies in no tier; move it to one of {', '.join(TIERS)} under {TESTS}")
    return tier


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") and os.environ.get("SIDP_TEST_GPU") == "1":
        own_shared_memory()


def own_shared_memory() -> None:
    """Gives this process, a worker of pytest-xdist, and its children a /dev/shm of their own.

    Ranks that share a GPU meet in NVSHMEM's /dev/shm/mps_shm_0, whatever job they belong to: of two jobs that start at
    once one opens the other's events, and NVSHMEM ends the process.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    clone_newns = 0x20000
    if libc.unshare(clone_newns):
        raise pytest.UsageError(
            f"-n needs root, for a /dev/shm a worker: {os.strerror(ctypes.get_errno())}; leave out -n"
        )
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if TESTS in item.path.parents:
            item.add_marker(tier_of(item.path))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return TESTS.parent


@pytest.fixture(autouse=True)
def _gpu_tier(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu"):
        need_gpu()


@pytest.fixture(params=["host", "nvshmem"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that meets the contract; skipped where the machine lacks it."""
    name = str(request.param)
    if name == "nvshmem":
        need_gpu()
    return name


def need_gpu() -> None:
    """Skips the test with what is missing for the GPU backend; ``tests/gpu/run.sh`` makes that a failure."""
    from sidp_runtime import _nvshmem

    if reason := _nvshmem.missing():
        if os.environ.get("SIDP_TEST_GPU") == "1":
            pytest.fail(f"SIDP_TEST_GPU=1, but: {reason}")
        pytest.skip(reason)


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"{n}ranks")
def world_size(request: pytest.FixtureRequest) -> int:
    return int(request.param)
