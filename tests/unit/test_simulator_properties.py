"""What holds of any WaS simulation: no floor is beaten, bytes are exact, and one puller gains from more bandwidth."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidp_runtime._C import LINK_GRACE_SHARE
from sidp_runtime.simulator import SimulationConfig, simulate

ROUNDING_MS = 1e-6  # of sums of doubles


@st.composite
def configs(draw: st.DrawFn) -> SimulationConfig:
    world_size = draw(st.integers(2, 6))
    slots = draw(st.integers(1, 5))
    layer_ms = draw(st.integers(0, 3000)) / 1000
    return SimulationConfig(
        world_size=world_size,
        layer_bytes=tuple(draw(st.lists(st.integers(1, 200), min_size=1, max_size=14))),
        layer_ms=layer_ms,
        link_gbps=draw(st.floats(1e-5, 1e-3)),  # 10 to 1000 bytes a ms
        ring_slots=slots,
        num_steps=draw(st.integers(1, 3)),
        copy_latency_us=draw(st.floats(0, 500)),
        start_ms=tuple(draw(st.floats(0, 20)) for _ in range(world_size)),
        gap_ms=draw(st.floats(0, 3)),
        seed=draw(st.integers(0, 9)),
        slices=draw(st.integers(1, 3)),
        slice_group=draw(st.integers(1, slots)),
        rotate=draw(st.booleans()),
        refill=draw(st.booleans()),
        exclusive_links=draw(st.booleans()),
    )


@settings(max_examples=40, deadline=None)
@given(configs())
def test_no_replica_beats_its_floors_and_bytes_are_exact(config: SimulationConfig) -> None:
    placement = config.placement()
    for replica in simulate(config).replicas:
        streamed = sum(config.layer_bytes[layer] for layer in placement.streamed_layers(replica.rank))
        link_ms = streamed / (config.link_gbps * 1e6)
        compute_ms = len(config.layer_bytes) * config.compute_ms(0, 1)
        elapsed = max(replica.steps[-1].end_ms, replica.last_copy_ms) - replica.steps[0].start_ms
        assert elapsed >= config.num_steps * max(compute_ms, link_ms) - ROUNDING_MS
        assert sum(replica.bytes_by_peer) == config.num_steps * streamed
        assert all(step.duration_ms >= compute_ms - ROUNDING_MS for step in replica.steps)


@settings(max_examples=40, deadline=None)
@given(configs())
def test_no_port_carries_more_than_it_can(config: SimulationConfig) -> None:
    result = simulate(config)
    assert max(result.egress_utilisation + result.ingress_utilisation) <= 1 + 1e-9


@settings(max_examples=40, deadline=None)
@given(configs(), st.floats(1.0, 8.0))
def test_more_bandwidth_is_never_slower_without_contention(config: SimulationConfig, factor: float) -> None:
    """Of two ranks: each owner has one puller. With more, another speed is another phase, and may meet more traffic."""
    pair = replace(config, world_size=2, start_ms=config.start_ms[:2])
    slow, fast = simulate(pair), simulate(replace(pair, link_gbps=pair.link_gbps * factor))
    for before, after in zip(slow.replicas, fast.replicas, strict=True):
        assert after.steps[-1].end_ms <= before.steps[-1].end_ms + ROUNDING_MS


@settings(max_examples=40, deadline=None)
@given(configs())
def test_alone_a_replica_is_bound_by_the_sum_of_both(config: SimulationConfig) -> None:
    """Others start long after: copies and compute of one replica at worst take turns."""
    settings_ = replace(config, start_ms=(0.0,) + (1e6,) * (config.world_size - 1), gap_ms=0.0)
    replica = simulate(settings_).replicas[0]
    streamed = config.placement().streamed_layers(0)
    copies = sum(config.layer_bytes[layer] for layer in streamed) / (config.link_gbps * 1e6)
    copies += len(streamed) * config.slices * config.copy_latency_us * 1e-3
    total = config.num_steps * (copies + len(config.layer_bytes) * config.compute_ms(0, 1))
    graces = config.num_steps * copies / LINK_GRACE_SHARE  # ahead of each, a share of the one before
    assert replica.total_ms <= total + graces + ROUNDING_MS


@settings(max_examples=40, deadline=None)
@given(configs())
def test_an_exclusive_link_carries_one_copy_at_a_time(config: SimulationConfig) -> None:
    by_owner: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for span in simulate(replace(config, exclusive_links=True, trace=True)).spans:
        if span.kind == "copy":
            by_owner[span.peer].append((span.start_ms, span.end_ms))
    for copies in by_owner.values():
        assert all(first[1] <= second[0] + ROUNDING_MS for first, second in pairwise(sorted(copies)))


@settings(max_examples=40, deadline=None)
@given(configs())
def test_two_ranks_have_nobody_to_take_turns_with(config: SimulationConfig) -> None:
    pair = replace(config, world_size=2, start_ms=config.start_ms[:2], trace=True)
    assert simulate(replace(pair, exclusive_links=True)) == simulate(replace(pair, exclusive_links=False))


@settings(max_examples=40, deadline=None)
@given(configs(), st.floats(0, 100), st.data())
def test_a_dead_reader_blocks_no_link(config: SimulationConfig, dead_ms: float, data: st.DataObject) -> None:
    """Whether it had the link, waited for it or did neither."""
    dead = data.draw(st.integers(0, config.world_size - 1))
    placement = config.placement()
    result = simulate(replace(config, exclusive_links=True, dead_ms={dead: dead_ms}))
    for replica in result.replicas:
        if replica.rank != dead:
            streamed = sum(config.layer_bytes[layer] for layer in placement.streamed_layers(replica.rank))
            assert len(replica.steps) == config.num_steps
            assert sum(replica.bytes_by_peer) == config.num_steps * streamed


@pytest.mark.parametrize(
    ("replicas", "jitter", "most"),
    [(3, 0.0, 1.05), (4, 0.0, 1.05), (8, 0.0, 1.05), (3, 0.02, 1.05), (4, 0.02, 1.05), (8, 0.02, 1.16)],
)
@pytest.mark.parametrize("seed", range(3))
def test_replicas_in_phase_fill_exclusive_links_and_not_shared_ones(
    replicas: int, jitter: float, most: float, seed: int
) -> None:
    """Copies of 1 ms, layers of 0.1 ms: the floor is the link's. Of eight that are not quite in phase, some lose every
    seventh turn for good.
    """
    streamed = 4 * (replicas - 1)
    config = SimulationConfig(
        world_size=replicas,
        layer_bytes=(1_000_000,) * 4 * replicas,
        layer_ms=0.1,
        link_gbps=1.0,
        warm_slots=2,
        num_steps=8,
        jitter=jitter,
        seed=seed,
    )
    exclusive, shared = (
        mean(ms for replica in simulate(replace(config, exclusive_links=value)).replicas for ms in replica.step_ms[4:])
        for value in (True, False)
    )
    assert exclusive <= most * streamed
    assert shared >= 1.3 * streamed
