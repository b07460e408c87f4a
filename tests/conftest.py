"""Tiers: a test belongs to the folder that it lies in, and carries that folder's marker."""

from __future__ import annotations

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if TESTS in item.path.parents:
            item.add_marker(tier_of(item.path))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return TESTS.parent


@pytest.fixture(params=["host", "nvshmem"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that meets the contract; skipped where the build lacks it."""
    name = str(request.param)
    from sidp_runtime import _C

    if name not in _C.backend_names():
        pytest.skip(f"backend {name!r} is not in this build, which has: {', '.join(_C.backend_names())}")
    return name


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"{n}ranks")
def world_size(request: pytest.FixtureRequest) -> int:
    return int(request.param)
