"""Every test belongs to exactly one tier, and carries that tier's marker."""

from __future__ import annotations

import re

import pytest
from conftest import TESTS, TIERS, tier_of


def test_every_test_file_lies_in_one_tier() -> None:
    files = sorted(path for path in TESTS.rglob("*.py") if path.name.startswith("test_"))
    assert len(files) > 10
    for path in files:
        assert path.relative_to(TESTS).parts[0] in TIERS, f"{path} lies in no tier"
        assert re.search(r"^\s*(async )?def test_", path.read_text(), re.M), f"{path} tests nothing"


def test_file_names_are_unique() -> None:
    """Modules of one name in two folders cannot be imported in one session."""
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_the_marker_is_the_folder(request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        mine = {mark.name for mark in item.iter_markers()} & set(TIERS)
        assert mine == {tier_of(item.path)}, item.nodeid


def test_every_tier_is_a_registered_marker(pytestconfig: pytest.Config) -> None:
    registered = {line.split(":")[0] for line in pytestconfig.getini("markers")}
    assert set(TIERS) <= registered


def test_a_file_outside_the_tiers_is_refused() -> None:
    with pytest.raises(pytest.UsageError, match="lies in no tier"):
        tier_of(TESTS / "test_stray.py")
