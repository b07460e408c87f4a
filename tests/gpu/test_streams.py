"""What only streams can get wrong: slots released too early, deadlocks, device-wide synchronisation, paths in use."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.models import SyntheticModel, mlp
from helpers.processes import RankContext, run_ranks
from helpers.ranks import open_replica

from sidp_runtime.errors import UnsupportedError

LONG = 20_000_000  # cycles, about 10 ms


def long_kernel_before_release(context: RankContext, too_early: bool) -> int:
    """One slot, so the next copy lands where the last layer is still read. How many layers came out wrong."""
    model = SyntheticModel(num_layers=8, hidden=64)
    wrong = 0
    with open_replica(context, model, mode="was", ops=(), backend="nvshmem", ring_slots=1) as replica:
        reader = torch.cuda.Stream()
        for seed in range(3):
            x = replica.rows(4, seed)
            results = []
            with replica.runtime.step(num_tokens=4):
                for layer in replica.streamed:
                    tensors = replica.fetch(layer)
                    if too_early:  # what an engine does wrong: the reader's work is not in the stream that releases
                        reader.wait_stream(torch.cuda.current_stream())
                        replica.runtime.release_layer(layer)
                        with torch.cuda.stream(reader):
                            torch.cuda._sleep(LONG)
                            results.append((layer, mlp(tensors, x)))
                    else:
                        torch.cuda._sleep(LONG)
                        results.append((layer, mlp(tensors, x)))
                        replica.runtime.release_layer(layer)
            torch.cuda.synchronize()
            wrong += sum(not torch.equal(y, mlp(replica.reference[layer], x)) for layer, y in results)
    return wrong


def test_a_slot_is_not_overwritten_while_a_kernel_reads_it() -> None:
    assert run_ranks(long_kernel_before_release, 2, too_early=False) == [0, 0]


def test_the_check_sees_a_slot_that_is_released_too_early() -> None:
    assert min(run_ranks(long_kernel_before_release, 2, too_early=True)) > 0


def everybody_asks_everybody(context: RankContext) -> int:
    """All ranks request at once while their own streams are full of work and the host synchronises the device."""
    model = SyntheticModel(num_layers=6, hidden=256)
    with open_replica(context, model, mode="cas", backend="nvshmem", max_rows=4) as replica:
        busy = torch.randn(2048, 2048, device=replica.device)
        others = [torch.cuda.Stream() for _ in range(12)]
        for seed in range(30):
            for stream in others:
                with torch.cuda.stream(stream):
                    busy @ busy
            replica.step(rows=1 + seed % 4, seed=seed)
            if seed % 5 == 0:
                torch.cuda.synchronize()
        torch.cuda.synchronize()
        stats = replica.runtime.stats()
        assert stats["fallbacks"] == 0
        assert sum(stats["requests_by_peer"]) == 30 * len(replica.streamed)
        context.meet("all asked")
        return sum(replica.runtime.stats()["served_by_peer"])


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ask_all_while_all_compute(world_size: int) -> None:
    served = run_ranks(everybody_asks_everybody, world_size)
    assert sum(served) == 30 * 6 * (world_size - 1)


def full_launch_queue(context: RankContext) -> None:
    """Steps of more launches than the driver takes at once, by ranks that wait for each other's answers meanwhile.

    3000 launches behind a request hung both, until the deadline.
    """
    launches = 150
    model = SyntheticModel(num_layers=40)
    with open_replica(
        context, model, mode="cas", backend="nvshmem", runtime_deadline_ms=8000, test_service_delay_us=30_000
    ) as replica:
        x, results = replica.rows(2), []
        small = torch.zeros(64, device=replica.device)
        with replica.runtime.step(num_tokens=2):
            for layer in replica.streamed:
                results.append((layer, replica.runtime.remote_compute(layer, "mlp", x)))
                for _ in range(launches):
                    small.add_(1)
        torch.cuda.synchronize()
        replica.runtime.check()
        assert small.tolist() == [launches * len(results)] * 64
        for layer, y in results:
            assert torch.equal(y, mlp(replica.reference[layer], x)), f"layer {layer}"
        assert replica.runtime.stats()["fallbacks"] == 0


def test_answers_come_while_the_launch_queues_are_full() -> None:
    run_ranks(full_launch_queue, 2)


def random_delays(context: RankContext, mode: str) -> None:
    pause = random.Random(context.rank)
    with open_replica(
        context, mode=mode, backend="nvshmem", test_lane_delay_us=2000, test_service_delay_us=1000
    ) as replica:
        for seed in range(15):
            replica.step(rows=1 + seed, seed=seed, between=lambda _: torch.cuda._sleep(pause.randrange(1_000_000)))


@pytest.mark.parametrize("mode", ["was", "cas"])
def test_random_delays(mode: str) -> None:
    run_ranks(random_delays, 3, mode=mode)


def engines(context: RankContext, owners: bool) -> list[bool]:
    with open_replica(context, mode="was", ops=(), backend="nvshmem", owners_engines=owners) as replica:
        for seed in range(5):
            replica.step(seed=seed)
        stats = replica.settled_stats(5 * len(replica.streamed) + len(replica.head()))
        assert stats["why_read"] == ""
        return list(stats["owners_engines"])


def test_layers_are_written_by_their_owners_copy_engines() -> None:
    shared = torch.cuda.device_count() < 2  # one engine for all
    assert run_ranks(engines, 2, owners=True) == ([[False] * 2] * 2 if shared else [[False, True], [True, False]])
    assert run_ranks(engines, 2, owners=False) == [[False, False]] * 2


def without_mappings(context: RankContext) -> None:
    arguments = {"test_without_mappings": True}
    with open_replica(context, mode="was", ops=(), backend="nvshmem", group_arguments=arguments) as replica:
        for seed in range(5):
            replica.step(seed=seed)
        moved = replica.streamed * 5 + replica.head()
        assert replica.settled_stats(len(moved))["bytes_by_peer"] == replica.bytes_by_peer(moved)


def test_peers_without_a_mapping_go_through_nvshmem() -> None:
    run_ranks(without_mappings, 2)


def cas_without_mappings(context: RankContext) -> str:
    arguments = {"test_without_mappings": True}
    with (
        pytest.raises(UnsupportedError, match="use mode WaS without ops") as caught,
        open_replica(context, mode="cas", backend="nvshmem", group_arguments=arguments),
    ):
        pass
    return str(caught.value)


def test_cas_needs_mappings() -> None:
    run_ranks(cas_without_mappings, 2)
