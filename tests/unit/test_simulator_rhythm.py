"""The rhythm of two replicas in CaS: what a remote layer costs, and what breaks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import median

import pytest

from sidp_runtime.errors import ConfigError
from sidp_runtime.placement import choose_resident_layers
from sidp_runtime.simulator.engine import Engine
from sidp_runtime.simulator.rhythm import RESIDENT, Rhythm, _Gpu, _Request, over_starts, remote_layer_us, step_us

TURNS = (0, 1) * 8
EXACT = Rhythm(TURNS, jitter=0.0, head_us=0.0, gap_us=0.0)


def test_work_shares_a_gpu_and_a_turn_waits_for_the_request_that_is_served() -> None:
    clock, ended = Engine(), {}

    def note(name: str) -> Callable[[], None]:
        return lambda: ended.setdefault(name, clock.now)

    gpu = _Gpu(clock, replace(EXACT, round_trip_us=0.0))
    gpu.run(100.0, note("first"))
    clock.at(50.0, lambda: gpu.run(100.0, note("second")))  # 50 alone, then 100 for the other 50, then 50 alone
    clock.at(300.0, lambda: gpu.ask(_Request(40.0, note("answered"), False, clock.now)))
    clock.at(310.0, lambda: gpu.begin_turn(note("turn")))
    clock.at(320.0, lambda: gpu.ask(_Request(40.0, note("late"), False, clock.now)))
    clock.at(500.0, gpu.end_turn)
    clock.run()
    assert ended == pytest.approx({"first": 150, "second": 200, "answered": 340, "turn": 340, "late": 541.5})


def test_a_layer_apart_only_round_trips_are_lost() -> None:
    """Three trips, and the moment until the service sees the end of a turn."""
    assert remote_layer_us(EXACT) == pytest.approx(3 * 20 + 1.5, abs=2)
    assert remote_layer_us(replace(EXACT, round_trip_us=40.0)) == pytest.approx(3 * 40 + 1.5, abs=2)


def test_all_layers_here_take_their_own_time_alone() -> None:
    steps = step_us(replace(EXACT, owners=(RESIDENT,) * 16, attention_us=(10.0, 300.0)))
    assert steps == pytest.approx((16 * (56 + 36 + 184 + 10), 16 * (56 + 36 + 184 + 300)))


def test_a_request_waits_for_its_owners_turns_as_long_as_it_has_patience() -> None:
    """Rank 1 owns all layers, so its turns follow each other at once."""
    soon, late = (
        step_us(replace(EXACT, owners=(1,) * 16, patience_us=us, num_steps=60))[0] / 16 for us in (400.0, 1200.0)
    )
    assert late - soon == pytest.approx(800, abs=60)
    with pytest.raises(ConfigError, match=r"a replica made [0-3] of 12 steps"):
        step_us(replace(EXACT, owners=(1,) * 16, patience_us=20000.0))


def test_a_request_that_goes_on_with_a_layer_waits_for_no_turn() -> None:
    """Otherwise engines fall into a second rhythm, each waiting for the other's whole layers."""
    found = {
        begun: max(
            remote_layer_us(Rhythm((0, 1) * 32, (300.0, 300.0), patience_us=2000.0, offset_us=us, begun_first=begun))
            for us in (0.0, 300.0, 700.0, 5000.0)
        )
        for begun in (True, False)
    }
    assert found[True] < 150
    assert found[False] > 300


@pytest.mark.parametrize("count", [8, 20, 32, 48])
def test_resident_layers_in_runs_keep_the_rhythm_from_most_starts(count: int) -> None:
    apart, runs = (over_starts(choose_resident_layers(64, count, 2, cas=cas)) for cas in (False, True))
    assert median(runs) < 90
    assert sum(us < 1.5 * median(over_starts([])) for us in runs) >= 5
    assert median(apart) > 1.5 * median(runs)


def test_of_unlike_steps_the_shorter_one_waits() -> None:
    alike, unlike = (median(over_starts([], us)) for us in ((115.0, 115.0), (90.0, 140.0)))
    assert unlike > alike + 100


def test_replicas_that_ask_nothing_lose_nothing_and_one_that_asks_is_counted_alone() -> None:
    with pytest.raises(ConfigError, match="no layer is remote"):
        remote_layer_us(replace(EXACT, owners=(RESIDENT,) * 4))
    assert remote_layer_us(replace(EXACT, owners=(RESIDENT, 1, RESIDENT))) > 60
