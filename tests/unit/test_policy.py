"""The mode policy: every reason, the boundary cases, and a profile that is measured once and never trusted blindly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sidp_runtime import _C, MachineProfile, Mode, ModePolicy
from sidp_runtime.errors import ConfigError

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
        "peers_available": True,
        "previous": None,
        "was_ms": None,
        "cas_ms": None,
        "profile": PROFILE.core(),
        "fixed": None,
        "hysteresis": 0.1,
    }
    return _C.decide(shape=_C.StepShape(**(shape or SHAPE)), **(arguments | changes))


W, C = Mode.WAS, Mode.CAS


@pytest.mark.parametrize(
    ("changes", "mode", "reason"),
    [
        # estimates: WaS 50 ms (the copies), CaS 10 + 1 + 0.16 ms
        ({}, C, "faster"),
        ({"fixed": W}, W, "fixed"),
        ({"fixed": C}, C, "fixed"),
        ({"fixed": C, "num_tokens": 65}, C, "fixed"),
        ({"fixed": C, "peers_available": False}, C, "fixed"),
        ({"num_tokens": 64}, C, "faster"),
        ({"num_tokens": 65}, W, "rows-beyond-slot"),
        ({"max_rows": 0}, W, "rows-beyond-slot"),
        ({"peers_available": False}, W, "peer-unavailable"),
        ({"peers_available": False, "previous": C, "cas_ms": 1.0}, W, "peer-unavailable"),
        # measured times replace the estimates
        ({"cas_ms": 60.0}, W, "faster"),
        ({"was_ms": 5.0}, W, "faster"),
        ({"was_ms": 5.0, "cas_ms": 4.0}, C, "faster"),
        ({"was_ms": 5.0, "cas_ms": 5.0}, W, "faster"),
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
        decision = decide(local, fixed=fixed, peers_available=False, num_tokens=1000)
        assert (decision.mode, decision.reason) == (W, "all-local")


def test_predictions_follow_the_stated_formulas() -> None:
    shape = _C.StepShape(**SHAPE)
    weights = SHAPE["total_bytes"] / 4
    for tokens in (1, 64, 4096):
        compute = max(SHAPE["total_bytes"] / 1e10, 2 * tokens * weights / 1e11)
        was = max(compute, 0.05)
        cas = compute + 5 * 2 * 100e-6 + 5 * tokens * 8000 / 1e9
        assert _C.predict_step_ms(W, tokens, PROFILE.core(), shape) == pytest.approx(1e3 * was)
        assert _C.predict_step_ms(C, tokens, PROFILE.core(), shape) == pytest.approx(1e3 * cas)
    decision = decide()
    assert decision.was_ms == pytest.approx(50)
    assert decision.cas_ms == pytest.approx(10 + 1 + 0.16)


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
        decide(profile=MachineProfile(**(rates | {name: value})).core())


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

    def measure(_: type[MachineProfile], device: int | None = None) -> MachineProfile:
        assert device is None
        calls.append(1)
        return MEASURED

    monkeypatch.setattr(MachineProfile, "measure", classmethod(measure))
    return calls


def test_calibrated_measures_once_and_reuses(cache: Path, measured: list[int]) -> None:
    first = ModePolicy.calibrated()
    second = ModePolicy.calibrated(fixed=Mode.CAS, hysteresis=0.3)
    assert first.profile == second.profile == MEASURED
    assert (second.fixed, second.hysteresis) == (Mode.CAS, 0.3)
    assert len(measured) == 1
    assert [path.name for path in cache.iterdir()] == ["profile-host.json"]


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another machine": lambda d: d | {"key": d["key"] | {"cores": 4000}},
    "another version": lambda d: d | {"key": d["key"] | {"version": 0}},
    "no key": lambda d: {k: v for k, v in d.items() if k != "key"},
    "a field less": lambda d: {k: v for k, v in d.items() if k != "flops_per_s"},
    "a field more": lambda d: d | {"extra": 1.0},
    "a list": lambda d: [d],
    "a number": lambda d: 3,
    "text for a rate": lambda d: d | {"flops_per_s": "fast"},
    "null for a rate": lambda d: d | {"flops_per_s": None},
    "zero": lambda d: d | {"copy_bytes_per_s": 0.0},
    "negative": lambda d: d | {"round_trip_us": -1.0},
    "not a number": lambda d: d | {"round_trip_us": math.nan},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_profile_is_measured_again(cache: Path, measured: list[int], damage: str) -> None:
    ModePolicy.calibrated()
    path = cache / "profile-host.json"
    path.write_text(json.dumps(DAMAGE[damage](json.loads(path.read_text()))))
    assert ModePolicy.calibrated().profile == MEASURED
    assert len(measured) == 2
    assert ModePolicy.calibrated().profile == MEASURED
    assert len(measured) == 2


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
    profile = MachineProfile.measure()
    assert profile.copy_bytes_per_s > 1e8
    assert 0 < profile.round_trip_us < 1e5
    assert profile.memory_bytes_per_s > 1e8
    assert profile.flops_per_s > 1e8
