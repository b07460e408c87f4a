"""What is refused before NVSHMEM starts, because it would end the process or wait for ever."""

from __future__ import annotations

import pytest

from sidp_runtime._nvshmem import check_sharing, visible_ordinals
from sidp_runtime.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("gpus", [["a"], ["a", "b"], ["a", "a", "a"], ["a", "b", "a", "b"], []])
def test_gpus_with_equally_many_ranks(gpus: list[str]) -> None:
    check_sharing(gpus)


@pytest.mark.parametrize("gpus", [["a", "b", "a"], ["a", "a", "b", "c"]])
def test_uneven_sharing_is_refused(gpus: list[str]) -> None:
    with pytest.raises(ConfigError, match=rf"equally many ranks.* {len(gpus)} ranks.*a: 2.*b: 1"):
        check_sharing(gpus)


def test_gpus_are_found_by_uuid_whatever_the_order_that_a_process_sees() -> None:
    devices = [{"uuid": "b", "ordinal": 0}, {"uuid": "a", "ordinal": 1}]
    assert visible_ordinals(devices, ["a", "b", "a", "c"]) == [1, 0, 1, -1]
