"""The contract of WaS: right bytes at fixed addresses, in order, every step; counters say exactly what moved."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from helpers.models import SyntheticModel
from helpers.processes import RankContext, run_ranks
from helpers.ranks import Replica, open_replica

import sidp_runtime as sidp


def fetch_every_step(context: RankContext, backend: str, model: dict[str, Any], ring_slots: int) -> None:
    with open_replica(
        context, SyntheticModel(**model), mode="was", ops=(), backend=backend, ring_slots=ring_slots
    ) as replica:
        addresses = {i: t["gate"].data_ptr() for i, t in views(replica).items()}
        steps = 6
        for seed in range(steps):
            assert replica.step(rows=1 + seed, seed=seed) == "was"
            assert {i: t["gate"].data_ptr() for i, t in views(replica).items()} == addresses
        streamed, head = replica.streamed, replica.head()
        stats = replica.settled_stats(steps * len(streamed) + len(head))
        assert stats["bytes_by_peer"] == replica.bytes_by_peer(streamed * steps + head)
        assert stats["bytes_by_peer"][context.rank] == 0
        assert stats["fetches"] == steps * len(streamed)
        assert stats["steps"] == {"was": steps, "cas": 0}
        assert stats["tokens"] == {"was": sum(range(1, steps + 1)), "cas": 0}
        assert stats["steps_broken_off"] == stats["layers_drained"] == stats["fallbacks"] == 0
        assert stats["requests_by_peer"] == stats["served_by_peer"] == [0] * context.world_size


def views(replica: Replica) -> dict[int, dict[str, torch.Tensor]]:
    model = replica.model
    return {i: model.short(i, replica.runtime.views(i)) for i in range(model.num_layers)}


@pytest.mark.parametrize("ring_slots", [1, 2, 3, 4])
def test_fetch_gives_the_right_bytes_every_step(backend: str, world_size: int, ring_slots: int) -> None:
    run_ranks(fetch_every_step, world_size, backend=backend, model={"num_layers": 7}, ring_slots=ring_slots)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(backend: str, dtype: str) -> None:
    run_ranks(fetch_every_step, 2, backend=backend, model={"dtype": dtype}, ring_slots=2)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_fewer_layers_than_ranks(backend: str, num_layers: int) -> None:
    run_ranks(fetch_every_step, 3, backend=backend, model={"num_layers": num_layers}, ring_slots=2)


def alone(context: RankContext, backend: str) -> None:
    with open_replica(context, mode="auto", backend=backend) as replica:
        assert replica.pool.local_layers == list(range(replica.model.num_layers))
        assert replica.pool.held_bytes == replica.pool.pooled_bytes
        assert replica.pool.memory_report()["ring_rss"] == 0
        with replica.runtime.step(num_tokens=1) as step:
            assert step.reason == "all-local"
        replica.step()
        stats = replica.settled_stats(0)
        assert stats["bytes_by_peer"] == stats["requests_by_peer"] == [0]
        assert stats["fetches"] == 0


def test_a_group_of_one_streams_nothing(backend: str) -> None:
    run_ranks(alone, 1, backend=backend)


def residents(context: RankContext, backend: str, resident: list[int]) -> None:
    with open_replica(context, backend=backend, mode="was", ops=(), resident_layers=resident) as replica:
        assert set(resident) <= set(replica.pool.local_layers)
        assert replica.pool.placement.owner(resident[0]) == -1
        replica.step()
        moved = replica.streamed + replica.head()
        stats = replica.settled_stats(len(moved))
        assert stats["bytes_by_peer"] == replica.bytes_by_peer(moved)
        everything = len(resident) == replica.model.num_layers
        assert (sum(stats["bytes_by_peer"]) == 0) == (everything or context.world_size == 1)


@pytest.mark.parametrize("resident", [[2], [4, 0], [0, 1, 2, 3, 4]])
def test_resident_layers_do_not_move(backend: str, world_size: int, resident: list[int]) -> None:
    run_ranks(residents, world_size, backend=backend, resident=resident)


def count_hits(context: RankContext) -> None:
    slots = 2
    model = SyntheticModel(num_layers=8)  # four streamed, a multiple of the slots: the lane is two ahead
    with open_replica(context, model, mode="was", ops=(), ring_slots=slots, test_lane_delay_us=100_000) as replica:
        streamed = replica.streamed
        replica.settled_stats(slots)  # the head of the first step streams at once
        with replica.runtime.step(num_tokens=1):
            for layer in streamed:
                replica.runtime.fetch_layer(layer)
                replica.runtime.release_layer(layer)
        stats = replica.settled_stats(len(streamed) + slots)
        hits = stats["ring_hits"]
        assert slots <= hits < len(streamed), "the lane is far slower than the step"
        assert stats["fetch_wait_ns"] > 50e6
        with replica.runtime.step(num_tokens=1):
            for index, layer in enumerate(streamed):
                replica.settled_stats(len(streamed) + slots + index)
                replica.runtime.fetch_layer(layer)
                replica.runtime.release_layer(layer)
        stats = replica.settled_stats(2 * len(streamed) + slots)
        assert stats["ring_hits"] == hits + len(streamed), "every layer was there before it was asked for"
        assert stats["copy_ns"] > stats["copies"] * 99e6


def test_ring_hits_and_waits_are_counted() -> None:
    """On the host, where the caller waits; on a GPU its stream does, and nobody counts."""
    run_ranks(count_hits, 2)


def hold_a_layer(context: RankContext, backend: str) -> None:
    """While a layer is held, the lane fills the other slot and then waits, however slow the consumer."""
    with open_replica(context, SyntheticModel(num_layers=8), mode="was", ops=(), backend=backend) as replica:
        runtime, streamed, slots = replica.runtime, replica.streamed, len(replica.head())
        assert slots == 2
        for step in range(3):
            with runtime.step(num_tokens=1):
                for index, layer in enumerate(streamed):
                    tensors = replica.fetch(layer)
                    released = step * len(streamed) + index
                    replica.settled_stats(released + slots)
                    replica.assert_layer(layer, tensors)
                    runtime.release_layer(layer)


def test_a_held_layer_is_never_overwritten(backend: str) -> None:
    run_ranks(hold_a_layer, 2, backend=backend)


def held_out_of_order(context: RankContext, backend: str) -> None:
    """Two layers held at once and released the other way round."""
    with open_replica(context, SyntheticModel(num_layers=8), mode="was", ops=(), backend=backend) as replica:
        streamed = replica.streamed
        for _ in range(3):
            with replica.runtime.step(num_tokens=1):
                for first, second in zip(streamed[::2], streamed[1::2], strict=True):
                    pair = [(layer, replica.fetch(layer)) for layer in (first, second)]
                    time.sleep(0.005)
                    for layer, tensors in reversed(pair):
                        replica.assert_layer(layer, tensors)
                        replica.runtime.release_layer(layer)


def test_layers_may_be_released_in_another_order(backend: str) -> None:
    run_ranks(held_out_of_order, 2, backend=backend)


def use_some(runtime: sidp.Runtime, layers: list[int], held: list[int]) -> None:
    """A step that uses these layers, keeps some, and fails."""
    with runtime.step(num_tokens=1):
        for layer in layers:
            runtime.fetch_layer(layer)
            if layer not in held:
                runtime.release_layer(layer)
        raise KeyError("engine")


def break_off(context: RankContext, backend: str) -> None:
    with open_replica(context, SyntheticModel(num_layers=8), mode="was", ops=(), backend=backend) as replica:
        runtime, streamed = replica.runtime, replica.streamed
        for fetched in range(len(streamed) + 1):
            for release_last in (True, False):
                held = [] if release_last else streamed[:fetched][-1:]
                with pytest.raises(KeyError, match="engine"):
                    use_some(runtime, streamed[:fetched], held)
                replica.step()
        broken = 2 * (len(streamed) + 1)
        stats = replica.settled_stats(2 * broken * len(streamed) + len(replica.head()))
        assert stats["steps_broken_off"] == broken
        assert stats["steps"]["was"] == broken
        assert stats["layers_drained"] == 2 * sum(range(len(streamed) + 1))
        context.meet("broken off")
        with pytest.raises(KeyError, match="engine"):
            close_inside(runtime)


def close_inside(runtime: sidp.Runtime) -> None:
    """The body's error is what one wants to see, not a refusal to end the step of a closed runtime."""
    with runtime.step(num_tokens=1):
        runtime.close()
        raise KeyError("engine")


def test_a_step_that_raises_leaves_the_ring_in_order(backend: str) -> None:
    run_ranks(break_off, 2, backend=backend)


def views_after_close(context: RankContext) -> None:
    with open_replica(context, mode="was", ops=()) as replica:
        tensors = {i: replica.model.short(i, replica.pool.layer_view(i)) for i in replica.pool.local_layers}
        ring = [replica.runtime.views(i) for i in replica.streamed]
        buffers = [replica.pool.buffer(i) for i in replica.pool.local_layers]
        replica.step()
    for layer, held in tensors.items():
        replica.assert_layer(layer, held)
    for held in ring:
        assert all(torch.isfinite(tensor).all() for tensor in held.values())
    assert sum(sum(buffer) for buffer in buffers) > 0
    replica.pool.close()
    replica.runtime.close()


def test_tensors_outlive_close() -> None:
    """On the host; on a GPU closing frees the memory of all ranks at once."""
    run_ranks(views_after_close, 2)


def late_publisher(context: RankContext, backend: str) -> list[float]:
    """Rank 1 fills its layers late; rank 0 must not be let through before."""
    model = SyntheticModel()
    with context.group(backend=backend) as group:
        pool = sidp.WeightPool(group, model.layers(), model.placement(2))
        if context.rank == 1:
            time.sleep(0.3)
        model.fill(pool)
        before = time.monotonic()
        pool.publish()
        after = time.monotonic()
        pool.close()
    return [before, after]


def test_publish_waits_for_every_rank(backend: str) -> None:
    early, late = run_ranks(late_publisher, 2, backend=backend)
    assert early[0] < late[0] <= early[1]
