"""torch.compile keeps fetch, use and release in order on streams, eagerly and in a captured graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.compiled import forward_of, poison_on_release
from helpers.models import SyntheticModel, mlp
from helpers.processes import RankContext, run_ranks
from helpers.ranks import MODES, Replica, open_replica

from sidp_runtime._C import StepKind
from sidp_runtime.runtime import Step

MODEL = SyntheticModel(num_layers=6, hidden=64)
ROWS = 3
EAGER_STEPS, REPLAYS = 4, 20


def expected(replica: Replica, x: torch.Tensor) -> torch.Tensor:
    for weights in replica.reference:
        x = mlp(weights, x)
    return x


def assert_same(y: torch.Tensor, expected: torch.Tensor) -> None:
    """But for the last bits: a compiler may sum in another order. Another layer's bytes would be far off."""
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def compiled(context: RankContext, mode: str, engine: str) -> dict[str, Any]:
    # the lane is slow: a use before its fetch would see another layer's bytes or NaN
    with open_replica(
        context, MODEL, backend="nvshmem", mode=mode, max_rows=ROWS, ring_slots=1, test_lane_delay_us=1000
    ) as replica:
        runtime, fixed = replica.runtime, MODES[mode]
        assert fixed is not None
        poison_on_release(replica)
        forward = torch.compile(forward_of(replica, mode == "was"), backend=engine, fullgraph=True)
        with torch.no_grad():
            for seed in range(EAGER_STEPS):
                x = replica.rows(ROWS, seed)
                with runtime.step(num_tokens=ROWS):
                    y = forward(x)
                assert_same(y, expected(replica, x))
                assert torch.equal(x, replica.rows(ROWS, seed)), "the step changed its input"
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph), runtime.capture_step(ROWS, fixed):
                y = forward(x)
            for seed in range(REPLAYS):
                x.copy_(replica.rows(ROWS, seed))
                with Step(runtime, ROWS, torch.cuda.current_stream().cuda_stream, StepKind.REPLAY, fixed) as step:
                    step.replay(graph)
                assert_same(y, expected(replica, x))
        torch.cuda.synchronize()
        stats = runtime.stats()
        assert stats["fallbacks"] == 0
        uses = (EAGER_STEPS + REPLAYS) * len(replica.streamed)
        assert stats["fetches"] == (uses if mode == "was" else 0)
        assert sum(stats["requests_by_peer"]) == (uses if mode == "cas" else 0)
        context.meet("all stepped")
        return stats


@pytest.mark.parametrize("mode", ["was", "cas"])
def test_a_compiled_step_equals_the_reference(mode: str) -> None:
    for stats in run_ranks(compiled, 2, mode=mode, engine="aot_eager"):
        assert stats["steps"][mode] == EAGER_STEPS + REPLAYS


# Not in mode CaS: Triton loads a kernel at its first launch, when a stream may wait for a rank that is doing the same.
def test_inductor_keeps_the_order_too() -> None:
    run_ranks(compiled, 2, mode="was", engine="inductor", timeout_s=240)


def used_late(context: RankContext) -> bool:
    with open_replica(
        context, MODEL, backend="nvshmem", mode="was", ops=(), ring_slots=1, test_lane_delay_us=50_000
    ) as replica:
        x = replica.rows(ROWS)
        expected(replica, x)  # loads what products need
        poison_on_release(replica)
        with replica.runtime.step(num_tokens=ROWS):
            y = forward_of(replica, was=True, late_use=True)(x)
        return bool(torch.isnan(y).any())


def test_the_poison_would_show_a_use_after_release() -> None:
    assert run_ranks(used_late, 2) == [True, True]
