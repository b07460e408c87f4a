"""torch.compile keeps fetch, use and release in order."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from helpers.compiled import forward_of, poison_on_release
from helpers.models import SyntheticModel
from helpers.processes import RankContext, run_ranks
from helpers.ranks import open_replica

MODEL = SyntheticModel(num_layers=6)


def compiled(context: RankContext, mode: str, engine: str) -> dict[str, Any]:
    # the lane is slow: a use before its fetch would see another layer's bytes or NaN
    with open_replica(context, MODEL, mode=mode, ring_slots=1, test_lane_delay_us=3000) as replica:
        poison_on_release(replica)
        forward = torch.compile(forward_of(replica, mode == "was"), backend=engine, fullgraph=True)
        with torch.no_grad():
            for seed in range(4):
                x = MODEL.rows(3, seed)
                with replica.runtime.step(num_tokens=3):
                    y = forward(x)
                torch.testing.assert_close(y, MODEL.forward(x))
                assert engine != "aot_eager" or torch.equal(y, MODEL.forward(x))
                assert torch.equal(x, MODEL.rows(3, seed)), "the step changed its input"
        return replica.runtime.stats()


@pytest.mark.parametrize("mode", ["was", "cas"])
def test_a_compiled_step_equals_the_reference(mode: str) -> None:
    for stats in run_ranks(compiled, 2, mode=mode, engine="aot_eager"):
        assert stats["steps"][mode] == 4
        assert stats["fetches" if mode == "was" else "request_rows"] == (12 if mode == "was" else 36)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_keeps_the_order_too() -> None:
    run_ranks(compiled, 2, mode="was", engine="inductor", timeout_s=150)


def used_late(context: RankContext) -> bool:
    with open_replica(context, MODEL, mode="was", ops=(), ring_slots=1, test_lane_delay_us=50_000) as replica:
        poison_on_release(replica)
        with replica.runtime.step(num_tokens=3):
            y = forward_of(replica, was=True, late_use=True)(MODEL.rows(3))
        return bool(torch.isnan(y).any())


def test_the_poison_would_show_a_use_after_release() -> None:
    assert run_ranks(used_late, 2) == [True, True]
