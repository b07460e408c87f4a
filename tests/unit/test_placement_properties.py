"""Placement and ring plan for any layers, ranks, slots and residents; the plan is also played against its flags."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidp_runtime import _C, Placement
from sidp_runtime.errors import ConfigError, UnknownNameError
from sidp_runtime.manifest import align_up
from sidp_runtime.placement import choose_resident_layers, next_reader


@dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...]
    world_size: int
    ring_slots: int
    residents: tuple[int, ...]

    def placement(self) -> Placement:
        return Placement.by_layer(
            self.sizes, self.world_size, ring_slots=self.ring_slots, resident_layers=self.residents
        )


@st.composite
def cases(draw: st.DrawFn, equal: bool = False) -> Case:
    count = draw(st.integers(1, 40))
    size = st.integers(1, 1 << 20)
    sizes = [draw(size)] * count if equal else draw(st.lists(size, min_size=count, max_size=count))
    residents = draw(st.sets(st.integers(0, count - 1), max_size=count)) if draw(st.booleans()) else set()
    return Case(tuple(sizes), draw(st.integers(1, 16)), draw(st.integers(1, 9)), () if equal else tuple(residents))


@given(cases())
def test_every_layer_has_one_owner_or_is_resident(case: Case) -> None:
    placement = case.placement()
    assert placement.num_layers == len(case.sizes)
    assert placement.world_size == case.world_size
    for layer, size in enumerate(case.sizes):
        owner = placement.owner(layer)
        assert placement.layer_bytes(layer) == size
        assert placement.is_resident(layer) == (layer in case.residents) == (owner == -1)
        holders = [rank for rank in range(case.world_size) if placement.is_local(rank, layer)]
        assert holders == (list(range(case.world_size)) if owner == -1 else [owner])
    for rank in range(case.world_size):
        streamed = [i for i in range(len(case.sizes)) if not placement.is_local(rank, i)]
        assert placement.streamed_layers(rank) == streamed


@given(cases())
def test_layers_do_not_overlap_and_add_up(case: Case) -> None:
    placement = case.placement()
    for holder in (-1, *range(case.world_size)):
        mine = [i for i in range(len(case.sizes)) if placement.owner(i) == holder]
        end = 0
        for layer in sorted(mine, key=placement.offset):
            assert placement.offset(layer) == end  # aligned, without gaps beyond the alignment
            end = align_up(placement.offset(layer) + case.sizes[layer])
        assert end == (placement.resident_bytes if holder < 0 else placement.pool_bytes(holder))
    pooled = sum(align_up(size) for layer, size in enumerate(case.sizes) if layer not in case.residents)
    assert sum(map(placement.pool_bytes, range(case.world_size))) == pooled


@given(cases())
def test_no_rank_holds_more_than_its_share_and_one_layer(case: Case) -> None:
    placement = case.placement()
    held = [placement.pool_bytes(rank) for rank in range(case.world_size)]
    pooled = [align_up(size) for layer, size in enumerate(case.sizes) if layer not in case.residents]
    largest = max(pooled, default=0)
    assert max(held) <= sum(pooled) / case.world_size + largest
    assert max(held) - min(held) <= largest


@given(cases(equal=True))
def test_equal_layers_go_round_the_ranks(case: Case) -> None:
    placement = case.placement()
    owners = [placement.owner(layer) for layer in range(len(case.sizes))]
    assert owners == [layer % case.world_size for layer in range(len(case.sizes))]


@given(cases())
def test_ring_addresses_are_fixed_apart_and_inside_the_ring(case: Case) -> None:
    placement = case.placement()
    for rank in range(case.world_size):
        plan, again = placement.ring_plan(rank), placement.ring_plan(rank)
        assert [(e.layer, e.offset) for e in plan] == [(e.layer, e.offset) for e in again]
        assert [e.layer for e in plan] == placement.streamed_layers(rank)
        slots, stride = placement.num_slots(rank), placement.slot_bytes(rank)
        assert slots == min(case.ring_slots, len(plan))
        assert placement.ring_bytes(rank) == slots * stride
        assert {e.slot for e in plan} == set(range(slots))
        for entry in plan:
            assert entry.bytes == case.sizes[entry.layer] <= stride
            assert entry.offset == entry.slot * stride
            assert entry.offset % _C.ALIGNMENT == 0


def play(placement: Placement, rank: int, choices: list[bool], steps: int = 2) -> None:
    """Lane and consumer take turns as ``choices`` say; each side moves when its flag allows. Fails on an overwrite."""
    plan = placement.ring_plan(rank)
    total = steps * len(plan)
    full = [False] * placement.num_slots(rank)
    content: list[int] = [-1] * len(full)
    copied = used = turn = 0
    while used < total:
        lane_first = choices[turn % len(choices)] if choices else True
        turn += 1
        lane, user = plan[copied % len(plan)], plan[used % len(plan)]
        can_copy = not full[lane.slot] and copied < total + len(full)
        can_use = full[user.slot]
        assert can_copy or can_use, f"deadlock at copy {copied}, use {used}"
        if can_copy and (lane_first or not can_use):
            if copied >= len(full):
                assert content[lane.slot] == lane.after_layer
            content[lane.slot], full[lane.slot] = lane.layer, True
            copied += 1
        else:
            assert content[user.slot] == user.layer, "the consumer sees another layer"
            full[user.slot] = False
            used += 1


@settings(max_examples=60)
@given(cases(), st.lists(st.booleans(), max_size=30))
def test_the_ring_plan_never_overwrites_and_never_deadlocks(case: Case, choices: list[bool]) -> None:
    placement = case.placement()
    for rank in range(case.world_size):
        if placement.ring_plan(rank):
            play(placement, rank, choices, steps=3)


@pytest.mark.parametrize("count", range(1, 30))
@pytest.mark.parametrize("slots", range(1, 8))
def test_a_slot_is_reused_no_sooner_than_promised(count: int, slots: int) -> None:
    """Distance between two users of a slot, across the step boundary too."""
    placement = Placement.by_layer([1] * (count * 2), 2, ring_slots=slots)
    slot_of = [entry.slot for entry in placement.ring_plan(0)] * 3
    slots = min(slots, count)
    shortest = min(
        later - index
        for index, slot in enumerate(slot_of[: 2 * count])
        for later in [next(k for k in range(index + 1, len(slot_of)) if slot_of[k] == slot)]
    )
    assert shortest >= (slots + count % slots) // 2 if count % slots else shortest == slots


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([], 1), "at least one layer"),
        (([1, 0], 1), "layer 1 has 0 bytes"),
        (([1], 0), "world_size is 0"),
        (([1], -3), "world_size is -3"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[list[int], int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Placement.by_layer(*arguments)


def test_bad_options_and_indices_are_refused() -> None:
    with pytest.raises(ConfigError, match="ring_slots is 0"):
        Placement.by_layer([1], 1, ring_slots=0)
    for layer in (-1, 2):
        with pytest.raises(ConfigError, match=f"resident layer {layer} is not one of the 2"):
            Placement.by_layer([1, 1], 1, resident_layers=[layer])
    placement = Placement.by_layer([1, 1], 2)
    for layer in (-1, 2):
        with pytest.raises(UnknownNameError, match=f"layer {layer} is not one of"):
            placement.owner(layer)
    for rank in (-1, 2):
        with pytest.raises(ConfigError, match=f"rank {rank} is not one of 0 to 1"):
            placement.ring_plan(rank)


@pytest.mark.parametrize("sizes", [[1 << 63, 1 << 63], [(1 << 64) - 1], [1 << 62] * 5])
def test_sizes_beyond_an_address_space_are_refused(sizes: list[int]) -> None:
    """A sum that wraps round would make a pool of a few bytes for layers of exabytes."""
    with pytest.raises(ConfigError):
        Placement.by_layer(sizes, 1)


@given(world_size=st.integers(2, 72), last=st.integers(0, 71), data=st.data())
def test_a_links_next_reader_waits_and_nobody_else_does_between(
    world_size: int, last: int, data: st.DataObject
) -> None:
    last %= world_size
    waiting = data.draw(st.lists(st.integers(0, world_size - 1), unique=True, max_size=world_size))
    chosen = next_reader(last, world_size, waiting)
    if not waiting:
        assert chosen == -1
        return
    assert chosen in waiting
    skipped = [(last - distance) % world_size for distance in range(1, ((last - chosen) % world_size or world_size))]
    assert not set(skipped) & set(waiting)


@given(st.integers(1, 120), st.floats(0, 1), st.integers(1, 16), st.booleans())
def test_as_many_layers_are_kept_as_were_asked_for(num_layers: int, share: float, world_size: int, cas: bool) -> None:
    count = round(share * num_layers)
    kept = choose_resident_layers(num_layers, count, world_size, cas=cas)
    assert len(kept) == count
    assert kept == sorted(set(kept))
    assert not kept or 0 <= kept[0] <= kept[-1] < num_layers


def test_kept_layers_lie_in_runs_for_steps_in_cas() -> None:
    assert choose_resident_layers(64, 20, 2, cas=True) == [*range(22, 32), *range(54, 64)]
    assert choose_resident_layers(64, 30, 2, cas=True) == [*range(10, 20), *range(32, 42), *range(54, 64)]
    assert choose_resident_layers(64, 62, 2, cas=True) == list(range(2, 64))
    assert choose_resident_layers(64, 16, 4, cas=False) == list(range(0, 64, 4))


@given(st.integers(1, 120), st.floats(0, 1), st.integers(1, 16))
def test_runs_are_long_and_between_two_each_rank_owns_as_many(num_layers: int, share: float, world_size: int) -> None:
    kept = choose_resident_layers(num_layers, round(share * num_layers), world_size, cas=True)
    ends = [layer for layer in kept if layer + 1 not in kept]
    starts = [layer for layer in kept if layer - 1 not in kept]
    lengths = [end + 1 - start for start, end in zip(starts, ends, strict=True)]
    ahead = [start - end - 1 for end, start in zip([-1, *ends], starts, strict=False)]
    if len(ends) > 1:
        assert min(lengths) >= 10
        assert min(ahead) >= 6
        assert all(layers % world_size == 0 for layers in ahead[:-1])
