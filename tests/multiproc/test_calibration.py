"""``sidp calibrate`` with real ranks on the host, and what a runtime makes of the profile: times, reasons, warnings."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.processes import RankContext, run_ranks
from helpers.ranks import PROFILE, open_replica
from typer.testing import CliRunner

import sidp_runtime as sidp
from sidp_runtime import Mode, ModePolicy, calibration, cli, machine_profile
from sidp_runtime.errors import ConfigError, DeadlineError, SidpError, UnhelpfulWarning
from sidp_runtime.planner import GpuProfile

SMALL = replace(
    calibration.make_job(backend="host", model=None, num_layers=4, check=(1, 8), profile=None),
    hidden=128,
    q=128,
    kv=64,
    inner=256,
    rows=(1, 8, 32),
)


def test_a_calibration_is_stored_read_and_planned_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDP_CACHE_DIR", str(tmp_path))
    start = time.monotonic()
    stages: list[str] = []
    found = calibration.calibrate(SMALL, stages.append)
    assert (stages[0], stages[-1]) == ("small copies and requests", "steps of 8 rows in both modes")
    assert time.monotonic() - start < 60
    p = found.profile
    assert p.linear_times is not None
    assert p.linear_times.num_bytes == SMALL.layers()[0].num_bytes
    assert p.linear_times.rows == (1, 8, 32)
    assert 1e7 < p.copy_bytes_per_s < 1e12
    assert 1 < p.round_trip_us < 1e5
    assert 0 < p.copy_latency_us < 1e5
    assert p.request_bytes_per_s is not None
    assert p.request_bytes_per_s > 1e7
    assert p.assumed in ((), ("request_bytes_per_s",))  # the latter where a busy host made rows seem to take no time
    assert p.assumed or p.request_bytes_per_s < p.copy_bytes_per_s
    assert [step.tokens for step in found.steps] == [1, 8]
    for step in found.steps:
        assert min(step.was_measured_ms, step.cas_measured_ms) > 0
        assert step.loss >= 0
        # 2 layers are streamed: a step cannot be quicker than its own products
        assert step.was_measured_ms > 0.2 * 4 * p.linear_times.seconds[0] * 1e3
    (path,) = calibration.store(found.document)
    kept = ModePolicy.calibrated().profile
    assert kept.linear_times is not None
    assert kept.round_trip_us == pytest.approx(p.round_trip_us)
    assert kept.request_bytes_per_s == pytest.approx(p.request_bytes_per_s)
    assert kept.linear_times.seconds == pytest.approx(p.linear_times.seconds)
    planned = GpuProfile.read(path)
    assert planned.rates == kept
    assert "sidp calibrate" in planned.sources[1]
    key = json.loads(path.read_text())["machine"]
    assert key["processor"] in planned.sources[1]
    assert machine_profile.differences(key, machine_profile.machine_key(None)) == []


def test_ranks_that_are_late_say_where_they_are() -> None:
    with pytest.raises(
        DeadlineError, match=r"rank 0 \(its start\), rank 1 \(its start\) did not finish .* within 2 ms"
    ):
        calibration.calibrate(replace(SMALL, deadline_ms=1))


def test_a_rank_that_fails_ends_the_calibration_with_its_words() -> None:
    with pytest.raises(SidpError, match=r"rank [01]: backend 'none' is not in this build"):
        calibration.calibrate(replace(SMALL, backend="none"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend", "none"], "neither host nor nvshmem"),
        (["--layers", "2"], "at least 4"),
        (["--check", "--tokens", "one"], "not of the form"),
        (["--check", "--tokens", "0"], "at least 1"),
        (["--model", "nothing"], "bundled shapes"),
        (["--profile", "nothing.json"], "not a readable profile"),
    ],
)
def test_the_command_says_in_a_line_what_is_wrong(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(cli.app, ["calibrate", *arguments])
    assert result.exit_code == 1
    assert words in result.stderr


def _explained(context: RankContext) -> dict[str, object]:
    # a link so slow that the policy is for CaS, whatever the clock says
    profile = replace(PROFILE, copy_bytes_per_s=1.0, round_trip_us=1e-3)
    with warnings.catch_warnings(record=True) as caught, open_replica(context, profile=profile, max_rows=4) as replica:
        assert replica.runtime.predicted_modes([1, 4, 5]) == {1: Mode.CAS, 4: Mode.CAS, 5: Mode.WAS}
        for rows in (1, 3, 3, 3, 3, 5):
            replica.step(rows=rows)
        with replica.runtime.step(num_tokens=9) as step:
            words = step.explanation
            for layer in replica.streamed:
                replica.fetch(layer)
                replica.runtime.release_layer(layer)
        stats = replica.runtime.stats()
    return {
        "words": words,
        "warnings": [str(w.message) for w in caught if w.category is UnhelpfulWarning],
        "stats": {k: stats[k] for k in ("step_times", "mode_changes", "last_decision", "steps")},
    }


def test_a_runtime_explains_its_steps_and_times_them() -> None:
    for result in run_ranks(_explained, 2):
        assert any("no step of up to 8192 tokens" in words for words in result["warnings"])
        assert result["words"] == "WaS for 9 tokens: a request holds 4 rows"
        stats = result["stats"]
        assert stats["last_decision"] == result["words"]
        assert stats["steps"] == {"was": 2, "cas": 5}
        by_size = {(t["mode"], t["from_tokens"], t["to_tokens"]): t for t in stats["step_times"]}
        assert {k: t["steps_timed"] for k, t in by_size.items()} == {
            ("cas", 1, 1): 1,
            ("cas", 2, 3): 4,
            ("was", 4, 7): 1,
            ("was", 8, 15): 1,
        }
        for times in by_size.values():
            assert times["measured_ms"] > 0
            assert times["predicted_ms"] > 0


def _fixed(context: RankContext) -> str:
    with context.group() as group:
        model = (
            sidp.LayerSpec("l0", (sidp.TensorSpec("w", (4, 4), "float32"),)),
            sidp.LayerSpec("l1", (sidp.TensorSpec("w", (4, 4), "float32"),)),
        )
        placement = sidp.Placement.by_layer([s.num_bytes for s in model], 2)
        with sidp.WeightPool(group, model, placement) as pool:
            pool.publish()
            with pytest.raises(ConfigError, match="batch size 8 is fixed to CaS, but a request holds 0 rows"):
                sidp.Runtime(pool, policy=ModePolicy(PROFILE, fixed={4: Mode.WAS, 8: Mode.CAS}))
            with (
                warnings.catch_warnings(record=True) as caught,
                sidp.Runtime(pool, policy=ModePolicy(PROFILE, fixed={4: Mode.WAS})) as runtime,
            ):
                assert any("sharing saves nothing" in str(w.message) for w in caught)
                context.meet("end")
                return str(runtime.predicted_modes([1])[1])


def test_a_size_fixed_to_cas_needs_its_rows_and_a_pool_that_saves_nothing_warns() -> None:
    assert run_ranks(_fixed, 2) == ["Mode.WAS", "Mode.WAS"]


def _cas_over_local(context: RankContext, resident: tuple[int, ...]) -> tuple[float, float]:
    # products wait for memory, and requests cost nothing
    free = {"round_trip_us": 1e-9, "request_bytes_per_s": 1e30, "memory_bytes_per_s": 1e6, "flops_per_s": 1e30}
    profile = replace(PROFILE, linear_times=None, **free)
    with open_replica(context, profile=profile, max_rows=4, resident_layers=resident) as replica:
        placement, layers = replica.pool.placement, replica.pool.layers
        total = sum(layer.num_bytes for layer in layers)
        remote = sum(placement.layer_bytes(layer) for layer in placement.streamed_layers(context.rank)) / total
        waits = 1.5 * (sum(placement.layer_bytes(layer) for layer in resident) / total) ** 2 * remote
        return replica.runtime._core.preview(4).cas_ms / (total / 1e3), 1 + waits


@pytest.mark.parametrize("resident", [(), (0, 3)])
def test_a_runtime_knows_what_is_resident(resident: tuple[int, ...]) -> None:
    for found, expected in run_ranks(_cas_over_local, 2, resident=resident):
        assert found == pytest.approx(expected, rel=1e-3)
        assert (expected > 1.01) == bool(resident)
