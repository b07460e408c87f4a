"""Tiers: a test belongs to the folder that it lies in, and carries that folder's marker."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
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
    if not hasattr(config, "workerinput"):
        # What tests measure beside each other must not become the profile of who runs them, wherever that is kept.
        folder = tempfile.TemporaryDirectory(prefix="sidp-test-cache-")
        config.add_cleanup(folder.cleanup)
        own = pytest.MonkeyPatch()
        config.add_cleanup(own.undo)
        own.setenv("SIDP_CACHE_DIR", folder.name)  # workers inherit it
    elif os.environ.get("SIDP_TEST_GPU") == "1":
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
            tier = tier_of(item.path)
            item.add_marker(tier)
            if tier == "gpu" and (reason := missing_gpu()):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return TESTS.parent


@pytest.fixture(params=["host", "nvshmem"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that meets the contract; skipped where the machine lacks it."""
    name = str(request.param)
    if name == "nvshmem" and (reason := missing_gpu()):
        pytest.skip(reason)
    return name


@functools.cache
def missing_gpu() -> str | None:
    """What the GPU backend lacks here, for tests to be skipped with; ``tests/gpu/run.sh`` makes that an error."""
    from sidp_runtime import _nvshmem

    reason = _nvshmem.missing()
    if reason and os.environ.get("SIDP_TEST_GPU") == "1":
        raise pytest.UsageError(f"SIDP_TEST_GPU=1, but: {reason}")
    return reason


@pytest.fixture(scope="session")
def unpooled_real_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model as transformers reads it, pickled: the file takes transformers ten to twenty seconds each time."""
    import torch
    from helpers.gguf_model import real_model
    from helpers.hf import load_unpooled

    path = tmp_path_factory.mktemp("unpooled") / "model.pt"
    torch.save(load_unpooled(real_model()), path)
    return path


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"{n}ranks")
def world_size(request: pytest.FixtureRequest) -> int:
    return int(request.param)
