"""torch.compile keeps fetch, use and release in order."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.models import SyntheticModel, mlp
from helpers.processes import RankContext, run_ranks
from helpers.ranks import Replica, open_replica

MODEL = SyntheticModel(num_layers=6)
Forward = Callable[[torch.Tensor], torch.Tensor]


def poison_on_release(replica: Replica) -> None:
    """From now on a released layer's bytes turn into NaN at once, so that a late use shows."""
    runtime = replica.runtime
    release = runtime.release_layer

    def poisoned(layer: int, *, stream: object = None) -> None:
        if not replica.pool.is_local(layer):
            for tensor in runtime.views(layer).values():
                tensor.fill_(float("nan"))
        release(layer, stream=stream)

    runtime.release_layer = poisoned  # type: ignore[method-assign]


def forward_of(replica: Replica, was: bool, late_use: bool = False) -> Forward:
    model, runtime, pool = replica.model, replica.runtime, replica.pool
    handle = runtime.handle
    views = [model.short(i, runtime.views(i)) for i in range(model.num_layers)]
    local = [pool.is_local(i) for i in range(model.num_layers)]

    def forward(x: torch.Tensor) -> torch.Tensor:
        for layer in range(model.num_layers):
            if not was and not local[layer]:
                (x,) = torch.ops.sidp.remote_compute(x, handle, layer, "mlp")
                continue
            x = x.clone()
            torch.ops.sidp.fetch_layer(x, handle, layer)
            y = x.clone() if late_use else mlp(views[layer], x)
            torch.ops.sidp.release_layer(y, handle, layer)
            x = mlp(views[layer], x) if late_use else y
        return x

    return forward


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
