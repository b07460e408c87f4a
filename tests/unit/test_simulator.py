"""The simulator against cases that can be worked out by hand. 1 GB/s is 10^6 bytes a ms."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from sidp_runtime import Mode
from sidp_runtime._C import LINK_GRACE_SHARE
from sidp_runtime.errors import ConfigError
from sidp_runtime.simulator import SimulationConfig, Span, simulate
from sidp_runtime.simulator.engine import Engine
from sidp_runtime.simulator.network import Network

MB = 10**6
GRACE = 1.0 / LINK_GRACE_SHARE  # of a copy of 1 ms: a link is left for a moment between two


def config(world_size: int = 2, num_layers: int = 2, **changes: Any) -> SimulationConfig:
    """Layers of 100 MB over links of 100 GB/s: 1 ms a copy that is alone."""
    base = SimulationConfig(
        world_size=world_size, layer_bytes=(100 * MB,) * num_layers, layer_ms=0.0, link_gbps=100.0, num_steps=1
    )
    return replace(base, **changes)


def durations(settings: SimulationConfig) -> list[float]:
    return [sum(replica.step_ms) for replica in simulate(settings).replicas]


def test_one_puller_takes_bytes_over_bandwidth_and_the_latency() -> None:
    assert durations(config()) == pytest.approx([1.0, 1.0])
    assert durations(config(copy_latency_us=250.0)) == pytest.approx([1.25, 1.25])


@pytest.mark.parametrize("num_pullers", [1, 2, 7, 71])
def test_pullers_of_one_owner_share_its_egress(num_pullers: int) -> None:
    """Only layer 0 is streamed: all but its owner pull it at the same time."""
    settings = config(num_pullers + 1, num_layers=1, exclusive_links=False)
    assert durations(settings) == pytest.approx([0.0] + [float(num_pullers)] * num_pullers)
    utilisation = simulate(settings).egress_utilisation
    assert utilisation == pytest.approx([1.0] + [0.0] * num_pullers)


@pytest.mark.parametrize("num_pullers", [2, 7, 71])
def test_pullers_of_one_owner_take_turns(num_pullers: int) -> None:
    """All ask at once: the highest rank is served first, as nobody was before it, and then each one below."""
    turns = [k * 1.0 + (k - 1) * GRACE for k in range(num_pullers, 0, -1)]
    assert durations(config(num_pullers + 1, num_layers=1)) == pytest.approx([0.0, *turns])


def test_a_link_serves_who_waits_next_and_not_who_waits_longest() -> None:
    """Rank 2 has the link from 0 on, 3 and then 1 ask in the meantime: 1 comes after 2."""
    settings = config(4, num_layers=1, start_ms=(0.0, 0.5, 0.0, 0.25), trace=True)
    copies = sorted((span.start_ms, span.rank) for span in simulate(settings).spans if span.kind == "copy")
    assert [rank for _, rank in copies] == [2, 1, 3]
    assert [start_ms for start_ms, _ in copies] == pytest.approx([0.0, 1 + GRACE, 2 + 2 * GRACE])


def test_each_slice_asks_for_the_link_anew() -> None:
    settings = config(3, num_layers=1, slices=2, trace=True)
    copies = sorted((span.start_ms, span.rank) for span in simulate(settings).spans if span.kind == "copy")
    assert [rank for _, rank in copies] == [2, 1, 2, 1]


def test_only_lanes_take_turns() -> None:
    """Rank 1's lane and rank 2, which copies a dead owner's layer in CaS mode, share its link."""
    modes = (Mode.WAS, Mode.WAS, Mode.CAS)
    assert durations(config(3, num_layers=1, mode=modes, dead_ms={0: 0.0}, refill=False)) == pytest.approx(
        [0.0, 2.0, 2.0]
    )


def test_flows_share_max_min_fairly() -> None:
    """Rank 0 pulls layer 1 alone; 1 and 2 share owner 0, then rank 1 has layer 2 to itself and rank 2 layer 1."""
    result = simulate(config(3, num_layers=3, ring_slots=3, trace=True, exclusive_links=False))
    copies = {(s.rank, s.layer): (s.start_ms, s.end_ms) for s in result.spans if s.kind == "copy"}
    assert copies[0, 1] == pytest.approx((0.0, 1.0))
    assert copies[0, 2] == pytest.approx((1.0, 2.0))
    assert copies[1, 0] == copies[2, 0] == pytest.approx((0.0, 2.0))
    assert copies[1, 2] == copies[2, 1] == pytest.approx((2.0, 3.0))


def test_what_a_tight_port_leaves_is_shared_by_others() -> None:
    """Three flows into rank 3 get a third each; what the one from rank 0 leaves of its egress goes to rank 4."""
    engine, ends = Engine(), {}
    network = Network(engine, 5, 100.0, 100.0, lambda rank: None)
    for name, source, target in (("a", 0, 3), ("b", 1, 3), ("c", 2, 3), ("d", 0, 4)):
        network.start(source, target, 100.0 * MB, lambda name=name: ends.update({name: engine.now}))  # type: ignore[misc]
    engine.run()
    assert ends == pytest.approx({"a": 3.0, "b": 3.0, "c": 3.0, "d": 1.5})


def test_callbacks_of_one_instant_keep_their_order() -> None:
    engine, seen = Engine(), list[str]()
    for time_ms, name in ((1.0, "b"), (0.0, "a"), (1.0, "c"), (1.0, "d")):
        engine.at(time_ms, lambda name=name: seen.append(name))  # type: ignore[misc]
    engine.after(1.0, lambda: seen.append("never")).cancel()
    engine.run()
    assert "".join(seen) == "abcd"


def test_a_staggered_start_takes_the_owners_in_turn() -> None:
    """In phase two pullers share owner 0; one copy time apart they do not."""
    apart = simulate(config(3, num_layers=1, start_ms=(0.0, 0.0, 1.0)))
    assert [replica.step_ms[0] for replica in apart.replicas] == pytest.approx([0.0, 1.0, 1.0 + GRACE])


def test_compute_bound_is_compute() -> None:
    result = simulate(config(num_layers=8, layer_ms=5.0, num_steps=4, warm_slots=2))
    for replica in result.replicas:
        assert replica.step_ms == pytest.approx([40.0] * 4)
        assert replica.wait_ms == 0.0


def test_copies_slow_compute_only_while_they_run() -> None:
    """8 ms of compute, 1 ms of copies beside it in which a third of it is lost."""
    settings = config(num_layers=2, layer_ms=4.0, overlap_slowdown=1.5, start_ms=(0.0, 50.0))
    rank = simulate(settings).replicas[0]
    assert rank.step_ms[0] == pytest.approx(8.0 + 1.0 / 3)
    assert rank.wait_ms == 0.0


def test_refill_hides_the_head_of_the_next_step() -> None:
    """3 ms of compute and 2 ms of copies a step; without refill each step begins with an empty ring."""
    settings = config(num_layers=4, layer_ms=0.75, num_steps=5)
    for replica in simulate(replace(settings, refill=False)).replicas[1:]:
        assert replica.step_ms == pytest.approx([4.0] * 5)  # rank 1 needs layer 0 at once
    for replica in simulate(replace(settings, warm_slots=2)).replicas:
        assert replica.step_ms == pytest.approx([3.0] * 5)


def test_a_deeper_ring_takes_up_uneven_compute() -> None:
    """Two layers of 10 ms, then 8 quick ones: only a ring that holds them all has them ready."""

    def layer_ms(layer: int, rows: int) -> float:
        return 10.0 if layer < 2 else 0.1

    settings = config(num_layers=10, layer_ms=layer_ms, num_steps=6)
    shallow, deep = (max(durations(replace(settings, ring_slots=slots, warm_slots=slots))) for slots in (1, 5))
    assert deep == pytest.approx(6 * 20.8)
    assert shallow > deep + 6


def test_unequal_batches_do_not_hold_each_other_up() -> None:
    settings = config(num_layers=8, layer_ms=lambda layer, rows: 2.0 * rows, rows=(1, 3), warm_slots=2, num_steps=3)
    fast, slow = simulate(settings).replicas
    assert fast.step_ms == pytest.approx([16.0] * 3)
    assert slow.step_ms == pytest.approx([48.0] * 3)


def test_a_dead_rank_still_serves_its_layers() -> None:
    settings = config(3, num_layers=6, num_steps=4, layer_ms=1.0)
    alive, result = simulate(settings), simulate(replace(settings, dead_ms={0: 2.5}))
    died = result.replicas[0]
    assert died.died_ms == 2.5
    assert died.steps == ()
    assert sum(died.bytes_by_peer) <= 2.5 * 100 * MB
    for rank in (1, 2):
        assert len(result.replicas[rank].steps) == 4
        assert result.replicas[rank].bytes_by_peer == alive.replicas[rank].bytes_by_peer
        assert sum(result.replicas[rank].step_ms) <= sum(alive.replicas[rank].step_ms)


def test_bytes_are_conserved() -> None:
    result = simulate(config(5, num_layers=12, num_steps=3, ring_slots=3, warm_slots=3, gap_ms=2.0, slices=3, seed=7))
    placement = config(5, num_layers=12).placement()
    for replica in result.replicas:
        for peer, num_bytes in enumerate(replica.bytes_by_peer):
            owned = [layer for layer in range(12) if placement.owner(layer) == peer]
            assert num_bytes == (0 if peer == replica.rank else 3 * len(owned) * 100 * MB)
    port_bytes = 100 * MB * result.makespan_ms
    assert sum(result.egress_utilisation) == pytest.approx(sum(result.ingress_utilisation))
    assert sum(result.egress_utilisation) * port_bytes == pytest.approx(
        sum(sum(r.bytes_by_peer) for r in result.replicas)
    )


def test_runs_repeat_and_seeds_differ() -> None:
    settings = config(4, num_layers=8, num_steps=5, layer_ms=0.5, gap_ms=1.0, jitter=0.2, seed=1, trace=True)
    assert simulate(settings) == simulate(settings)
    assert simulate(settings) != simulate(replace(settings, seed=2))


def test_a_resident_layer_moves_nothing() -> None:
    result = simulate(config(num_layers=2, resident_layers=(0, 1), layer_ms=1.0))
    assert [replica.step_ms[0] for replica in result.replicas] == [2.0, 2.0]
    assert sum(map(sum, (replica.bytes_by_peer for replica in result.replicas))) == 0


def test_slices_interleave_the_owners_of_a_group() -> None:
    result = simulate(config(3, num_layers=3, ring_slots=2, slices=2, slice_group=2, trace=True))
    order = [(span.layer, span.end_ms) for span in result.spans if span.kind == "copy" and span.rank == 0]
    assert [layer for layer, _ in order] == [1, 2, 1, 2]
    rotated = simulate(config(3, num_layers=3, ring_slots=2, slice_group=2, rotate=True, trace=True))
    first = {rank: next(s.layer for s in rotated.spans if s.kind == "copy" and s.rank == rank) for rank in range(3)}
    assert first == {0: 1, 1: 2, 2: 0}
    assert [replica.last_copy_ms for replica in rotated.replicas] == pytest.approx([2.0 + GRACE] * 3)  # nobody shares


def test_a_sliced_layer_is_used_after_its_last_slice() -> None:
    """Rank 0, alone, needs layer 1, whose last slice lands 1.5 ms after it started, and layer 2, at 2 ms."""
    settings = config(3, num_layers=3, slices=2, slice_group=2, layer_ms=0.1, start_ms=(0.0, 50.0, 99.0), trace=True)
    computed = [s for s in simulate(settings).spans if s.kind == "compute" and s.rank == 0]
    assert [span.start_ms for span in computed] == pytest.approx([0.0, 1.5 + GRACE / 2, 2.0 + GRACE])  # of half a copy


@pytest.mark.parametrize("num_layers", range(3, 15))
@pytest.mark.parametrize("slots", range(1, 6))
def test_slices_never_block_the_ring(num_layers: int, slots: int) -> None:
    settings = config(3, num_layers=num_layers, ring_slots=slots, warm_slots=slots, slices=2, slice_group=slots)
    result = simulate(replace(settings, num_steps=3, rotate=True))
    assert [len(replica.steps) for replica in result.replicas] == [3, 3, 3]


def test_a_request_costs_a_round_trip_rows_and_the_owners_compute() -> None:
    """Rank 1 alone: layer 0 at its owner (20 us, 2 x 1 ms of rows, 3 ms), then its own layer."""
    settings = config(layer_ms=3.0, mode=Mode.CAS, rows=100, row_bytes=MB, round_trip_us=20.0, start_ms=(99.0, 0.0))
    result = simulate(settings)
    assert result.replicas[1].step_ms[0] == pytest.approx(0.02 + 2.0 + 3.0 + 3.0)
    assert result.replicas[1].wait_ms == pytest.approx(5.02)
    assert [replica.requests_served for replica in result.replicas] == [1, 1]


@pytest.mark.parametrize(
    ("start_ms", "order"),
    [
        # The owner ends its layer 0, serves 2, who asked first, and 1, and goes on with layer 1, which all hold.
        ((0.0, 0.5, 0.25), [("compute", 0, 0), ("serve", 0, 2), ("serve", 0, 1), ("compute", 1, 0)]),
        # It comes to its layer 0 after 1 asked and before 2 does.
        ((0.5, 0.0, 1.0), [("serve", 0, 1), ("compute", 0, 0), ("serve", 0, 2), ("compute", 1, 0)]),
    ],
)
def test_an_owners_own_layers_and_requests_take_turns_in_order_of_arrival(
    start_ms: tuple[float, ...], order: list[tuple[str, int, int]]
) -> None:
    settings = config(3, num_layers=2, resident_layers=(1,), layer_ms=2.0, mode=Mode.CAS, start_ms=start_ms)
    spans = [span for span in simulate(replace(settings, trace=True)).spans if span.rank == 0 and span.kind != "wait"]
    assert [(span.kind, span.layer, span.peer) for span in spans] == order
    assert [span.start_ms for span in spans] == pytest.approx([0.0, 2.0, 4.0, 6.0])
    assert simulate(settings).replicas[0].wait_ms == pytest.approx(8.0 - 2 * 2.0 - start_ms[0])


def test_replicas_in_phase_fall_into_a_pipeline_over_the_owners() -> None:
    """Without the ripple of the start, CaS of equal replicas takes what all-local compute takes."""
    result = simulate(config(4, num_layers=16, layer_ms=1.0, mode=Mode.CAS, num_steps=4, warm_slots=2))
    for replica in result.replicas:
        assert replica.step_ms[1:] == pytest.approx([16.0] * 3)
        assert replica.bytes_by_peer == (0.0,) * 4


def test_a_requester_of_a_dead_owner_falls_back_to_its_bytes() -> None:
    settings = config(layer_ms=3.0, mode=Mode.CAS, start_ms=(50.0, 0.0), dead_ms={0: 1.0}, detection_ms=4.0)
    result = simulate(replace(settings, num_steps=2, warm_slots=1))
    # The request of the first step dies with its owner: 5 ms, copy 1, compute 3, own layer 3; then 1 + 3 + 3.
    assert result.replicas[1].step_ms == pytest.approx([12.0, 7.0])
    assert result.replicas[1].bytes_by_peer == (200.0 * MB, 0.0)
    assert result.replicas[0].requests_served == 0


def test_spans_make_a_timeline() -> None:
    """Bars of one lane, and of one compute, do not overlap; waits and compute fill the step."""
    result = simulate(config(3, num_layers=6, layer_ms=0.7, num_steps=2, trace=True, overlap_slowdown=1.1))
    for replica in result.replicas:
        mine = [span for span in result.spans if span.rank == replica.rank]
        for kinds in ({"copy"}, {"compute", "wait"}):
            bars: list[Span] = sorted((s for s in mine if s.kind in kinds), key=lambda s: s.start_ms)
            assert all(a.end_ms <= b.start_ms + 1e-9 for a, b in pairwise(bars))
        spent = sum(span.end_ms - span.start_ms for span in mine if span.kind != "copy")
        assert spent == pytest.approx(sum(replica.step_ms))
        assert replica.wait_ms == pytest.approx(sum(s.end_ms - s.start_ms for s in mine if s.kind == "wait"))
    assert simulate(config()).spans == ()


def test_seventy_two_replicas_finish_quickly() -> None:
    begin = time.perf_counter()
    result = simulate(config(72, num_layers=144, layer_ms=1.0, gap_ms=1.0))
    assert time.perf_counter() - begin < 60
    assert len(result.replicas) == 72


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"world_size": 1}, "world_size is 1, must be 2 to 72"),
        ({"world_size": 73}, "world_size is 73"),
        ({"link_gbps": 0.0}, "link_gbps is 0.0, must be above 0"),
        ({"link_gbps": float("nan")}, "link_gbps is nan"),
        ({"layer_ms": -1.0}, "layer_ms is -1.0"),
        ({"num_steps": 0}, "num_steps is 0, must be at least 1"),
        ({"rows": 0}, "rows is 0"),
        ({"rows": (1, 2, 3)}, "rows has 3 entries for 2 ranks"),
        ({"rows": ()}, "rows has 0 entries"),
        ({"start_ms": (1.0,)}, "start_ms has 1 entries"),
        ({"start_ms": (0.0, -1.0)}, "start_ms of rank 1 is -1.0"),
        ({"mode": (Mode.WAS,)}, "mode has 1 entries"),
        ({"jitter": 1.0}, "jitter is 1.0"),
        ({"overlap_slowdown": 0.0}, "overlap_slowdown is 0.0"),
        ({"warm_slots": 3}, "warm_slots is 3 with 2 ring_slots"),
        ({"slice_group": 3}, "slice_group is 3 with 2 ring_slots"),
        ({"warm_slots": 1, "refill": False}, "without refill"),
        ({"dead_ms": {2: 0.0}}, "dead rank 2 is not one of 0 to 1"),
        ({"dead_ms": {0: -1.0}}, "dead_ms of rank 0 is -1.0"),
        ({"ring_slots": 0, "slice_group": 1}, "ring_slots"),
        ({"layer_bytes": ()}, "at least one layer"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**changes)


def test_a_layer_time_that_is_no_time_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer_ms of layer 0 and 1 rows is -1\.0"):
        simulate(config(layer_ms=lambda layer, rows: -1.0))
