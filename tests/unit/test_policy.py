"""The mode policy: every reason, the boundary cases, and a profile that is measured once and never trusted blindly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidp_runtime import _C, MachineProfile, Mode, ModePolicy, machine_profile, policy
from sidp_runtime.errors import ConfigError, DoubtfulProfileWarning
from sidp_runtime.planner import GpuProfile

PROFILE = MachineProfile(copy_bytes_per_s=1e9, round_trip_us=100.0, memory_bytes_per_s=1e10, flops_per_s=1e11)
MEASURED = MachineProfile(copy_bytes_per_s=2e9, round_trip_us=50.0, memory_bytes_per_s=2e10, flops_per_s=2e11)
# 100 MB, 50 MB of it streamed in 5 layers
SHAPE = {
    "total_bytes": 100_000_000,
    "streamed_bytes": 50_000_000,
    "streamed_layers": 5,
    "ops_per_layer": 2,
    "row_bytes": 8000,
    "element_bytes": 4,
}


def decide(shape: dict[str, int] | None = None, **changes: Any) -> _C.Decision:
    arguments: dict[str, Any] = {
        "num_tokens": 4,
        "max_rows": 64,
        "profile": PROFILE.core,
    }
    core = _C.StepShape(**(shape or SHAPE))
    times = _C.predict_step(arguments["num_tokens"], PROFILE.core, core)
    for name, predicted_s in (("was", times.was_s), ("cas", times.cas_s)):  # as corrections of the predictions
        if (ms := changes.pop(f"{name}_ms", None)) is not None:
            arguments[name] = (ms / (predicted_s * 1e3), 3)
    return _C.decide(shape=core, **(arguments | changes))


W, C = Mode.WAS, Mode.CAS


@pytest.mark.parametrize(
    ("changes", "mode", "reason"),
    [
        # estimates: WaS 50 ms (the copies), CaS 10 + 1 + 0.16 ms
        ({}, C, "faster"),
        ({"fixed": W}, W, "fixed"),
        ({"fixed": C}, C, "fixed"),
        ({"fixed": C, "num_tokens": 65}, C, "fixed"),
        ({"fixed": C, "unavailable_peer": 1}, C, "fixed"),
        ({"num_tokens": 64}, C, "faster"),
        ({"num_tokens": 65}, W, "rows-beyond-slot"),
        ({"max_rows": 0}, W, "rows-beyond-slot"),
        ({"unavailable_peer": 1}, W, "peer-unavailable"),
        ({"unavailable_peer": 1, "previous": C, "cas_ms": 1.0}, W, "peer-unavailable"),
        # measured times replace the estimates
        ({"cas_ms": 60.0}, W, "faster"),
        ({"was_ms": 5.0}, W, "faster"),
        ({"was_ms": 5.0, "cas_ms": 4.0}, C, "faster"),
        ({"was_ms": 5.0, "cas_ms": 5.001}, W, "faster"),
        # by captured batch size
        ({"fixed_sizes": [(2, W), (4, C), (8, W)]}, C, "fixed"),
        ({"fixed_sizes": [(2, C), (8, W)]}, W, "fixed"),
        ({"fixed_sizes": [(2, W)]}, C, "faster"),
        # where the mode changed often, more than the hysteresis
        ({"was_ms": 10.0, "cas_ms": 7.5, "previous": W, "recent_changes": 1}, C, "faster"),
        ({"was_ms": 10.0, "cas_ms": 7.5, "previous": W, "recent_changes": 3}, W, "hysteresis"),
        ({"was_ms": 10.0, "cas_ms": 4.9, "previous": W, "recent_changes": 99}, C, "faster"),
        # the other mode must be faster by the hysteresis
        ({"was_ms": 10.0, "cas_ms": 9.5, "previous": W}, W, "hysteresis"),
        ({"was_ms": 10.0, "cas_ms": 8.9, "previous": W}, C, "faster"),
        ({"was_ms": 9.5, "cas_ms": 10.0, "previous": C}, C, "hysteresis"),
        ({"was_ms": 8.9, "cas_ms": 10.0, "previous": C}, W, "faster"),
        ({"was_ms": 9.5, "cas_ms": 10.0, "previous": C, "hysteresis": 0.0}, W, "faster"),
        ({"was_ms": 10.0, "cas_ms": 9.5, "previous": C}, C, "faster"),
    ],
)
def test_decision(changes: dict[str, Any], mode: Mode, reason: str) -> None:
    decision = decide(**changes)
    assert (decision.mode, decision.reason) == (mode, reason)


def test_nothing_streamed_is_all_local_whatever_else() -> None:
    local = SHAPE | {"streamed_bytes": 0, "streamed_layers": 0}
    for fixed in (None, W, C):
        decision = decide(local, fixed=fixed, unavailable_peer=1, num_tokens=1000)
        assert (decision.mode, decision.reason) == (W, "all-local")


def test_predictions_follow_the_stated_formulas() -> None:
    shape = _C.StepShape(**SHAPE)
    weights = SHAPE["total_bytes"] / 4
    for tokens in (1, 64, 4096):
        compute = max(SHAPE["total_bytes"] / 1e10, 2 * tokens * weights / 1e11)
        times = _C.predict_step(tokens, PROFILE.core, shape)
        assert times.was_s == pytest.approx(max(compute + 0.05 / 10, 0.05))
        assert times.cas_s == pytest.approx(compute + 5 * 2 * 100e-6 + 5 * tokens * 8000 / 1e9)
    decision = decide()
    assert decision.was_ms == pytest.approx(50)
    assert decision.cas_ms == pytest.approx(10 + 1 + 0.16)


def test_a_decision_is_explained_with_its_figures() -> None:
    assert decide(was_ms=12.0).explanation == (
        "CaS for 4 tokens: faster, "
        "WaS 12 ms (predicted 50 ms x 0.24 of 3 timed steps) against CaS 11.2 ms (predicted 11.2 ms, not timed yet)"
    )
    assert decide(num_tokens=65).explanation == "WaS for 65 tokens: a request holds 64 rows"
    assert "rank 1 is dead or silent" in decide(unavailable_peer=1).explanation
    assert "looks 5 % faster, a change needs 10 %" in decide(was_ms=10.0, cas_ms=9.5, previous=W).explanation


NOISE = st.sampled_from(["uniform", "outliers", "gamma"])


# what is right for 16 tokens kept CaS away from 33
@example(was_ms=167.0, cas_ms=102.0, noise="uniform", seed=0, sizes=[16, 33])
@settings(max_examples=30, deadline=None)
@given(
    was_ms=st.floats(1, 1000),
    cas_ms=st.floats(1, 1000),
    noise=NOISE,
    seed=st.integers(0, 1 << 30),
    sizes=st.lists(st.integers(1, 64), min_size=1, max_size=3),
)
def test_noise_never_makes_it_swing(was_ms: float, cas_ms: float, noise: str, seed: int, sizes: list[int]) -> None:
    """Whatever the two modes take, however noisy: few changes, and in the end the faster mode, or nearly so."""
    random = Random(seed)

    def noisy(ms: float) -> float:
        if noise == "outliers":
            return ms * (20 if random.random() < 0.1 else random.uniform(0.97, 1.03))
        return ms * (random.uniform(0.9, 1.1) if noise == "uniform" else random.gammavariate(4, 0.25))

    simulated = _C.PolicySimulation(shape=_C.StepShape(**SHAPE), profile=PROFILE.core, max_rows=64)
    last: list[Mode] = []
    for i in range(1200):
        decision = simulated.step(sizes[i % len(sizes)], noisy(was_ms), noisy(cas_ms))
        last = [*last[-50:], decision.mode]
    # one to find out, and two for each trial; heavy noise between equals may add some. For each size: two that share a
    # bucket, and its corrections, may be predicted to want different modes.
    assert simulated.changes <= len(set(sizes)) * (16 if noise == "gamma" else 12)
    better, predicted_ms, worse_ms = (W, 50, cas_ms) if was_ms < cas_ms else (C, 36, was_ms)
    # a mode that is predicted to be slower than what the other one takes is never tried, by design
    if max(was_ms, cas_ms) > 1.6 * min(was_ms, cas_ms) and worse_ms > 2 * predicted_ms:
        assert last.count(better) > len(last) / 2


@settings(max_examples=40, deadline=None)
@given(st.floats(0.05, 20), st.integers(1, 64))
def test_corrections_converge(ratio: float, tokens: int) -> None:
    """Predictions that are wrong by a factor are right after a few steps."""
    shape = _C.StepShape(**SHAPE)
    times = _C.predict_step(tokens, PROFILE.core, shape)
    simulated = _C.PolicySimulation(shape=shape, profile=PROFILE.core, max_rows=64)
    for _ in range(6):
        decision = simulated.step(tokens, times.was_s * 1e3 * ratio, times.cas_s * 1e3)
    in_use = decision.was_ms if decision.mode == W else decision.cas_ms
    takes_ms = times.was_s * 1e3 * ratio if decision.mode == W else times.cas_s * 1e3
    assert in_use == pytest.approx(takes_ms)


def test_large_steps_hide_the_stream_and_small_ones_do_not() -> None:
    modes = [decide(num_tokens=n, max_rows=1 << 20).mode for n in (1, 10, 100, 1000, 10_000)]
    assert modes == sorted(modes, key=lambda mode: mode == W)
    assert modes[0] == C
    assert modes[-1] == W


@pytest.mark.parametrize("name", ["copy_bytes_per_s", "round_trip_us", "memory_bytes_per_s", "flops_per_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_profile_with_an_impossible_rate_is_refused(name: str, value: float) -> None:
    rates = {n: getattr(PROFILE, n) for n in ("copy_bytes_per_s", "round_trip_us", "memory_bytes_per_s")}
    rates["flops_per_s"] = PROFILE.flops_per_s
    with pytest.raises(ConfigError, match="above 0"):
        MachineProfile(**(rates | {name: value})).core  # noqa: B018


@pytest.mark.parametrize("hysteresis", [-0.1, 1.0, math.nan])
def test_hysteresis_out_of_range_is_refused(hysteresis: float) -> None:
    with pytest.raises(ConfigError, match="hysteresis"):
        ModePolicy(PROFILE, hysteresis=hysteresis)
    with pytest.raises(ConfigError, match="hysteresis"):
        decide(hysteresis=hysteresis)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SIDP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts measurements, which give ``MEASURED``."""
    calls: list[int] = []

    def measure(device: int | None, pool: object) -> MachineProfile:
        assert device is None
        calls.append(1)
        return MEASURED

    monkeypatch.setattr(policy, "measure", measure)
    return calls


def test_calibrated_measures_once_and_reuses(cache: Path, measured: list[int]) -> None:
    first = ModePolicy.calibrated()
    second = ModePolicy.calibrated(fixed=Mode.CAS, hysteresis=0.3)
    assert first.profile == second.profile == MEASURED
    assert (second.fixed, second.hysteresis) == (Mode.CAS, 0.3)
    assert len(measured) == 1
    assert [path.name for path in cache.iterdir()] == ["profile-host.json"]
    assert ModePolicy.from_file(cache / "profile-host.json").profile == MEASURED
    assert GpuProfile.read(cache / "profile-host.json").rates == MEASURED  # a plan takes the same file


def test_a_link_that_was_assumed_is_all_that_is_measured_later(
    cache: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = machine_profile.LinearTimes(1000, (1, 8), (0.1, 0.2))
    assumed = ("round_trip_us", "request_bytes_per_s", "copy_bytes_per_s")
    known = replace(MEASURED, linear_times=times, request_bytes_per_s=1e9, assumed=assumed)
    path = cache / "profile-host.json"
    machine_profile.write(path, machine_profile.document(known, machine_profile.machine_key(None), 1, "calibrated"))
    links: list[float | None] = [None, 7e9]
    monkeypatch.setattr(policy, "measure_link", lambda device, pool: links.pop(0))
    pool: Any = object()
    assert ModePolicy.calibrated().profile == known
    assert ModePolicy.calibrated(pool=pool).profile == known  # no link here either
    rows = 7e9 / MEASURED.copy_bytes_per_s * 1e9  # an assumption too, of a share of the link
    found = replace(known, copy_bytes_per_s=7e9, request_bytes_per_s=rows, assumed=assumed[:2])
    assert ModePolicy.calibrated(pool=pool).profile == found
    assert ModePolicy.calibrated(pool=pool).profile == found  # stored, and not asked for again
    assert json.loads(path.read_text())["measured"]["source"] == "calibrated; the link later, through a pool"
    assert not measured


@pytest.fixture
def busy(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A GPU that is known for 10 GB/s: what its link is measured at, in turn."""
    rates: list[float] = []
    marked = replace(MEASURED, assumed=("round_trip_us",))
    monkeypatch.setattr(policy, "measure", lambda device, pool: replace(marked, copy_bytes_per_s=rates.pop(0)))
    monkeypatch.setattr(policy, "measure_link", lambda device, pool: rates.pop(0))
    monkeypatch.setattr(policy, "_known_rates", lambda device: replace(MEASURED, copy_bytes_per_s=1e10))
    return rates


def test_what_a_busy_gpu_gives_is_measured_twice_used_and_not_kept(busy: list[float], cache: Path) -> None:
    busy += [1e8, 3e8, 2e8, 6e9]
    with pytest.warns(DoubtfulProfileWarning, match=r"not kept.*copy_bytes_per_s 0\.3 GB/s, known 10.*sidp calibrate"):
        assert ModePolicy.calibrated().profile.copy_bytes_per_s == 3e8
    assert not cache.exists()
    assert ModePolicy.calibrated().profile.copy_bytes_per_s == 6e9  # by now it is free
    assert ModePolicy.calibrated().profile.copy_bytes_per_s == 6e9
    assert not busy


def test_where_one_mode_is_fixed_a_known_gpu_has_its_link_measured_alone(busy: list[float], cache: Path) -> None:
    busy += [7e9, 1e8, 3e8, 6e9]
    assumed = ("round_trip_us", "request_bytes_per_s")
    assert ModePolicy.calibrated(fixed=Mode.WAS).profile == replace(MEASURED, copy_bytes_per_s=7e9, assumed=assumed)
    with pytest.warns(DoubtfulProfileWarning, match=r"copy_bytes_per_s 0\.3 GB/s, known 10"):
        assert ModePolicy.calibrated(fixed=Mode.WAS).profile.copy_bytes_per_s == 3e8
    assert not cache.exists()
    assert ModePolicy.calibrated(fixed={4: Mode.WAS}).profile.assumed == ("round_trip_us",)  # measured and stored
    assert ModePolicy.calibrated(fixed=Mode.WAS).profile.assumed == ("round_trip_us",)
    assert not busy


def test_of_two_measurements_the_less_doubtful_one_is_taken(
    cache: Path, busy: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [replace(MEASURED, copy_bytes_per_s=9.1e9, memory_bytes_per_s=1e9), replace(MEASURED, copy_bytes_per_s=9e9)]
    monkeypatch.setattr(policy, "measure", lambda device, pool: found.pop(0))
    assert ModePolicy.calibrated().profile.memory_bytes_per_s == MEASURED.memory_bytes_per_s
    assert not found
    assert cache.exists()


def test_a_doubtful_profile_is_measured_again_unless_calibrate_made_it(busy: list[float], cache: Path) -> None:
    path, key = cache / "profile-host.json", machine_profile.machine_key(None)
    times = machine_profile.LinearTimes(1000, (1, 8), (0.1, 0.2))
    slow = replace(
        MEASURED,
        copy_bytes_per_s=1e8,
        request_bytes_per_s=1e7,
        linear_times=times,
        assumed=("request_bytes_per_s",),
    )
    machine_profile.write(path, machine_profile.document(slow, key, 1, "sidp calibrate"))
    assert ModePolicy.calibrated().profile == slow
    short = replace(MEASURED, copy_bytes_per_s=1e8)
    machine_profile.write(path, machine_profile.document(short, key, 1, "in short"))
    busy.append(6e9)
    assert ModePolicy.calibrated().profile.copy_bytes_per_s == 6e9
    slow_memory = replace(short, copy_bytes_per_s=6e9, memory_bytes_per_s=9e9)
    assert policy.doubts(slow_memory, None) == ["memory_bytes_per_s 9 GB/s, known 20"]


def test_a_link_that_is_doubtful_later_is_not_kept(busy: list[float], cache: Path) -> None:
    path, key = cache / "profile-host.json", machine_profile.machine_key(None)
    without = replace(MEASURED, copy_bytes_per_s=1e10, assumed=("copy_bytes_per_s",))
    machine_profile.write(path, machine_profile.document(without, key, 1, "in short"))
    busy += [2e8, 1e8, 1e8, 9e9]
    pool: Any = object()
    with pytest.warns(DoubtfulProfileWarning):
        assert ModePolicy.calibrated(pool=pool).profile.copy_bytes_per_s == 2e8
    assert ModePolicy.calibrated(pool=pool).profile.copy_bytes_per_s == 9e9
    assert ModePolicy.calibrated(pool=pool).profile.copy_bytes_per_s == 9e9


def edited(part: str, **changes: object) -> Callable[[dict[str, Any]], Any]:
    return lambda d: d | {part: {k: v for k, v in (d[part] | changes).items() if v != "gone"}}


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another machine": (edited("machine", cores=4000), "cores is .* here and was 4000"),
    "another torch": (edited("machine", torch="1.0"), "torch is .* here and was '1.0'"),
    "another version": (edited("machine", package="0.0"), "package"),
    "another backend": (edited("machine", backend="nvshmem"), "backend"),
    "another schema": (lambda d: d | {"schema": 1}, "schema 1, this version reads 3"),
    "no machine": (lambda d: {k: v for k, v in d.items() if k != "machine"}, "does not say"),
    "a rate less": (edited("measured", tflops="gone"), "tflops"),
    "a list": (lambda d: [d], "list"),
    "a number": (lambda d: 3, "int"),
    "text for a rate": (edited("measured", tflops="fast"), "'fast'"),
    "null for a rate": (edited("measured", tflops=None), "None"),
    "zero": (edited("measured", copy_gbps=0.0), "copy_gbps is 0.0"),
    "negative": (edited("measured", round_trip_us=-1.0), "round_trip_us is -1.0"),
    "not a number": (edited("measured", round_trip_us=math.nan), "nan"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_stale_or_damaged_profile_is_refused_or_measured_again(cache: Path, measured: list[int], damage: str) -> None:
    ModePolicy.calibrated()
    path = cache / "profile-host.json"
    change, words = DAMAGE[damage]
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ConfigError, match=words):
        ModePolicy.from_file(path)
    assert ModePolicy.calibrated().profile == MEASURED
    assert len(measured) == 2
    assert ModePolicy.calibrated().profile == MEASURED
    assert len(measured) == 2


def test_a_gpu_is_covered_by_its_uuid_whatever_else_is_visible() -> None:
    key = {"backend": "nvshmem", "gpu": "NVIDIA H200", "driver": "13.0", "torch": "2.11", "package": "0.1"}
    there = key | {"uuid": "a", "gpus": ["a", "b"]}
    assert machine_profile.differences(there, key | {"uuid": "b", "gpus": ["b"]}) == []
    assert machine_profile.differences(there, key | {"uuid": "c", "gpus": ["a", "c"]}) == [
        "GPU c is not one of those measured"
    ]
    assert "driver is '12.8' here" in machine_profile.differences(there, there | {"driver": "12.8"})[0]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"key": '])
def test_a_torn_profile_is_measured_again(cache: Path, measured: list[int], content: bytes) -> None:
    cache.mkdir()
    (cache / "profile-host.json").write_bytes(content)
    assert ModePolicy.calibrated().profile == MEASURED
    assert len(measured) == 1


def test_a_cache_folder_that_cannot_be_made_is_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[int]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SIDP_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match="SIDP_CACHE_DIR"):
        ModePolicy.calibrated()


def test_measuring_gives_rates_above_zero() -> None:
    profile = policy.measure()
    assert profile.copy_bytes_per_s > 1e8
    assert 0 < profile.round_trip_us < 1e5
    assert profile.memory_bytes_per_s > 1e8
    assert profile.flops_per_s > 1e8
