"""The contract of CaS: an owner's result equals computing here, bit for bit, and both sides count alike."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch
from helpers.models import SyntheticModel, Weights, mlp, pair
from helpers.processes import RankContext, run_ranks
from helpers.ranks import PROFILE, open_replica

import sidp_runtime as sidp
from sidp_runtime import Mode, Op
from sidp_runtime.errors import RemoteOpError


def compute_every_step(context: RankContext, backend: str, model: dict[str, Any]) -> dict[str, Any]:
    rows = [1, 2, 3, 5, 8, 13, 16]
    with open_replica(context, SyntheticModel(**model), mode="cas", backend=backend) as replica:
        for seed, count in enumerate(rows):
            mode = replica.step(rows=count, seed=seed)
            assert mode == ("cas" if replica.streamed else "was")
        context.meet("stepped")
        streamed = replica.streamed
        stats = replica.settled_stats(len(replica.head()))  # the head of the first step, and nothing since
        assert stats["bytes_by_peer"] == replica.bytes_by_peer(replica.head())
        row_bytes = replica.rows(1).nbytes
        assert stats["request_rows"] == sum(rows) * len(streamed)
        assert stats["request_bytes"] == sum(rows) * len(streamed) * row_bytes
        assert stats["fallbacks"] == stats["served_failed"] == stats["fetches"] == 0
        mode = "cas" if streamed else "was"
        assert stats["steps"][mode] == len(rows)
        assert stats["tokens"][mode] == sum(rows)
        owners = [replica.pool.placement.owner(layer) for layer in streamed]
        expected = [len(rows) * owners.count(rank) for rank in range(context.world_size)]
        assert stats["requests_by_peer"] == expected
        # a stream's wait is not the host's
        assert (stats["reply_wait_ns"] > 0) == (bool(streamed) and backend == "host")
        return stats


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_remote_equals_local_bit_for_bit(backend: str, world_size: int, dtype: str) -> None:
    stats = run_ranks(compute_every_step, world_size, backend=backend, model={"dtype": dtype})
    for owner in range(world_size):
        for requester in range(world_size):
            assert stats[owner]["served_by_peer"][requester] == stats[requester]["requests_by_peer"][owner]
    assert sum(s["served_rows"] for s in stats) == sum(s["request_rows"] for s in stats)


def test_fewer_layers_than_ranks(backend: str) -> None:
    run_ranks(compute_every_step, 3, backend=backend, model={"num_layers": 2})


def larger_products(context: RankContext, backend: str) -> None:
    model = SyntheticModel(num_layers=3, hidden=192, inner=160)
    with open_replica(context, model, mode="cas", backend=backend, max_rows=64) as replica:
        for rows in (1, 7, 33, 64):
            replica.step(rows=rows, seed=rows)


def test_products_large_enough_for_blocked_kernels(backend: str) -> None:
    run_ranks(larger_products, 2, backend=backend)


def two_outputs(context: RankContext, backend: str) -> None:
    with open_replica(context, mode="cas", backend=backend, ops=("mlp", "pair")) as replica:
        for rows in (1, 4, 16):
            x = replica.rows(rows, rows)
            with replica.runtime.step(num_tokens=rows):
                for layer in replica.streamed:
                    for borrow in (True, False):
                        result = replica.runtime.remote_compute(layer, "pair", x, borrow=borrow)
                        assert isinstance(result, tuple)
                        for got, expected in zip(result, pair(replica.reference[layer], x), strict=True):
                            assert got.shape == expected.shape
                            assert torch.equal(got, expected)
                        if borrow and backend == "nvshmem" and not replica.pool.group.gpu_is_shared:
                            again = replica.runtime.remote_compute(layer, "pair", x, borrow=True)
                            assert [y.data_ptr() for y in again] == [y.data_ptr() for y in result], "it was copied"
                    kept = [got.clone() for got in result]
                    replica.runtime.remote_compute(layer, "pair", x + 1)
                    assert all(map(torch.equal, kept, result)), "a later request changed an earlier result"


def test_an_op_with_two_outputs(backend: str) -> None:
    run_ranks(two_outputs, 2, backend=backend)


def one(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    assert isinstance(result, torch.Tensor)
    return result


def odd_inputs(context: RankContext, backend: str) -> None:
    """Strided rows, rows that want a gradient, and inference mode."""
    with open_replica(context, mode="cas", backend=backend) as replica:
        layer = replica.streamed[0]
        expected_of = replica.reference[layer]
        wide = torch.cat([replica.rows(4), replica.rows(4, 1)], dim=1)
        strided = wide[:, : replica.model.hidden]
        assert not strided.is_contiguous()
        wants_grad = replica.rows(4).requires_grad_()
        with replica.runtime.step(num_tokens=4):
            for x in (strided, wants_grad, replica.rows(4).t().contiguous().t()):
                y = one(replica.runtime.remote_compute(layer, "mlp", x))
                assert not y.requires_grad
                assert torch.equal(y, mlp(expected_of, x.detach().contiguous()))
            with torch.inference_mode():
                assert torch.equal(one(replica.runtime.remote_compute(layer, "mlp", strided)), y)


def test_rows_in_any_layout(backend: str) -> None:
    run_ranks(odd_inputs, 2, backend=backend)


def switch_every_step(context: RankContext, backend: str) -> dict[str, Any]:
    """The policy is not asked: each step's mode is set by swapping the decision's input, the row count."""
    modes = []
    # on such a link one row is cheaper sent than the layers fetched
    profile = dataclasses.replace(PROFILE, copy_bytes_per_s=1e6)
    with open_replica(context, backend=backend, max_rows=8, profile=profile) as replica:
        for seed in range(12):
            # more rows than a slot: WaS for sure; else what the estimates say
            modes.append(replica.step(rows=9 if seed % 2 else 1, seed=seed))
        assert modes[1::2] == ["was"] * 6
        stats = replica.runtime.stats()
        assert stats["steps"] == {"was": modes.count("was"), "cas": modes.count("cas")}
        assert stats["decisions"]["rows-beyond-slot"] == 6
        assert sum(stats["decisions"].values()) == 12
        was = modes.count("was")
        moved = replica.streamed * was + replica.head()
        assert replica.settled_stats(len(moved))["bytes_by_peer"] == replica.bytes_by_peer(moved)
        return {"modes": modes}


def test_the_mode_may_change_every_step(backend: str) -> None:
    results = run_ranks(switch_every_step, 3, backend=backend)
    assert any("cas" in result["modes"] for result in results)


def look_up(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """Fails at run time for ids outside the table; a trace cannot know."""
    return torch.nn.functional.embedding(x[:, 0], w["table"])


def owner_fails(context: RankContext) -> dict[str, Any]:
    layers = [sidp.LayerSpec(f"l{i}", (sidp.TensorSpec(f"l{i}.table", (10, 4), "float32"),)) for i in range(2)]
    with context.group() as group:
        placement = sidp.Placement.by_layer([layer.num_bytes for layer in layers], 2)
        pool = sidp.WeightPool(group, layers, placement)
        for i in pool.local_layers:
            pool.layer_view(i)[f"l{i}.table"].copy_(torch.arange(40.0).view(10, 4) + i)
        pool.publish()
        op = Op("look_up", look_up, 1, "int64", {i: {"table": f"l{i}.table"} for i in range(2)})
        policy = sidp.ModePolicy(PROFILE, fixed=Mode.CAS)
        with sidp.Runtime(pool, policy=policy, ops=[op], max_rows=4) as runtime:
            remote = 1 - context.rank
            with runtime.step(num_tokens=2):
                ids = torch.tensor([[3], [9]])
                expected = torch.arange(40.0).view(10, 4)[[3, 9]] + remote
                assert torch.equal(one(runtime.remote_compute(remote, "look_up", ids)), expected)
                with pytest.raises(RemoteOpError, match=f"layer {remote} failed at its owner") as caught:
                    runtime.remote_compute(remote, "look_up", ids + 5)
                assert (caught.value.rank, caught.value.peer, caught.value.layer) == (1 - remote, remote, remote)
                assert torch.equal(one(runtime.remote_compute(remote, "look_up", ids)), expected)
            context.meet("asked")
            return runtime.stats()


def test_an_op_that_fails_at_its_owner_is_reported_and_serving_goes_on() -> None:
    """On the host: a kernel that fails on a GPU takes its process's context with it."""
    stats = run_ranks(owner_fails, 2)
    assert [s["served_failed"] for s in stats] == [1, 1]
    assert [s["fallbacks"] for s in stats] == [0, 0]


def slow_owner(context: RankContext, backend: str) -> float:
    with open_replica(context, mode="cas", backend=backend, test_service_delay_us=20_000) as replica:
        start = time.monotonic()
        replica.step()  # compares results, so the stream has run too
        seconds = time.monotonic() - start
        stats = replica.runtime.stats()
        assert backend != "host" or stats["reply_wait_ns"] >= 20e6 * len(replica.streamed)
        assert stats["fallbacks"] == 0
        return seconds


def test_a_slow_owner_is_waited_for(backend: str) -> None:
    assert min(run_ranks(slow_owner, 2, backend=backend)) >= 0.02 * 2
