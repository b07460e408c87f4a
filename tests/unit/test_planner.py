"""Step times against the mode policy, the choice of residency and mode, thresholds, and the command."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.model_configs import RELEASED
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sidp_runtime import _C, cli
from sidp_runtime.errors import CapacityError, ConfigError
from sidp_runtime.planner import (
    GpuProfile,
    LinearTimes,
    MemorySettings,
    ModelShape,
    Plan,
    Planner,
    StepLoad,
    Streamed,
    Workload,
    bundled_gpus,
    display,
    step_time,
)

H200 = GpuProfile.read("H200")
QWEN = ModelShape.read("Qwen/Qwen3-32B")


def test_between_measured_rows_the_curve_is_good_to_a_seventh() -> None:
    """Each inner point predicted from its neighbours alone: how far off a size is that nobody measured."""
    assert H200.rates.linear_times is not None
    times, errors = H200.rates.linear_times, {}
    for i in range(1, len(times.rows) - 1):
        keep = [j for j in range(len(times.rows)) if j != i]
        fewer = LinearTimes(times.num_bytes, *(tuple(v[j] for j in keep) for v in (times.rows, times.seconds)))  # type: ignore[arg-type]
        without = replace(H200.rates, linear_times=fewer)
        errors[times.rows[i]] = without.linears_s(times.num_bytes, times.rows[i]) / times.seconds[i] - 1
    assert max(errors, key=lambda rows: abs(errors[rows])) == 128
    assert max(map(abs, errors.values())) == pytest.approx(0.139, abs=0.0005)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(bundled_gpus()), st.integers(1, 8192), st.integers(2, 16), st.integers(1, 63))
def test_plan_and_policy_agree_but_for_what_the_policy_does_not_know(
    gpu: str, rows: int, replicas: int, count: int
) -> None:
    """What the policy decides of a pool of these layers is what the plan says is faster without attention and head, and
    without what CaS waits for."""
    profile, part = GpuProfile.read(gpu), Streamed(count, count * 975_175_680)
    core = _C.StepShape(
        total_bytes=QWEN.linear_bytes,
        streamed_bytes=part.num_bytes,
        streamed_layers=count,
        ops_per_layer=step_time.OPS_PER_LAYER,
        row_bytes=QWEN.row_bytes,
        element_bytes=2,
        world_size=replicas,
    )
    decision = _C.decide(num_tokens=rows, max_rows=8192, shape=core, profile=profile.rates.core)
    times = step_time.step_times(profile, replace(QWEN, vocab=1), StepLoad(rows), part, replicas)
    assert decision.was_ms == pytest.approx(times.was_s * 1e3, rel=1e-4)
    cas_s = times.cas_s - count * step_time.CAS_WAIT_S
    assert decision.cas_ms == pytest.approx(cas_s * 1e3, rel=1e-4)
    if abs(times.was_s / cas_s - 1) > 1e-3:
        assert decision.mode == (_C.Mode.CAS if cas_s < times.was_s else _C.Mode.WAS)
    assert times.was_s >= times.was_floor_s * (1 - 1e-12) >= times.copy_s * (1 - 2e-12)


@given(st.sampled_from(bundled_gpus()), st.floats(1, 1e5), st.floats(0, 1e4))
def test_more_rows_never_take_less_time(gpu: str, rows: float, more: float) -> None:
    profile = GpuProfile.read(gpu)
    assert profile.linears_s(1e9, rows + more) >= profile.linears_s(1e9, rows) * (1 - 1e-12)


def test_attention_by_hand() -> None:
    decode = step_time.attention_s(H200, QWEN, StepLoad(10, context=1000))
    assert decode == pytest.approx(10 * 1000 * 262_144 / 3.658e12)
    prompt = step_time.attention_s(H200, QWEN, StepLoad(0, 0, 512, 512))
    assert prompt == pytest.approx(64 * 4 * 8192 * 512 * 256 / 613.8e12)
    windowed = replace(QWEN, windows=(100,) * 64)
    assert step_time.attention_s(H200, windowed, StepLoad(10, context=1000)) == pytest.approx(decode / 10)
    assert step_time.tensor_parallel_s(H200, QWEN, StepLoad(10), 1) == step_time.local_s(H200, QWEN, StepLoad(10))


def qwen_plan(**changes: Any) -> Plan:
    return Planner(QWEN, H200, 8, **changes).plan(Workload(2048, 512))


def test_the_best_residency_is_the_fastest_and_lies_between() -> None:
    shape, gpu = ModelShape.read("Qwen/Qwen2.5-72B"), GpuProfile.read("B200")
    plan = Planner(shape, gpu, 8, MemorySettings(max_rows=0)).plan(Workload(2048, 512))
    rates = [scheme.tokens_per_s or 0.0 for scheme in plan.residency]
    assert plan.best.num_resident == rates.index(max(rates))
    assert 0 < (plan.best.num_resident or 0) < 79
    assert plan.cas is None
    assert plan.thresholds.cas_below is None
    assert {scheme.mode for scheme in plan.residency if scheme.tokens_per_s} == {"WAS"}
    assert qwen_plan().kv_gain == pytest.approx(1.74, abs=0.005)
    assert plan.speedup == pytest.approx(max(rates) / (plan.dp.tokens_per_s or 0))
    assert 1.2 < plan.speedup < 1.35
    assert [scheme.name for scheme in qwen_plan().rows()][:5] == ["plain DP", "TP2 x DP4", "TP4 x DP2", "TP8", "SiDP"]


def test_throughput_is_batch_over_step() -> None:
    plan = qwen_plan()
    for scheme in plan.rows():
        assert scheme.step_s is not None
        units = 8 // scheme.devices_per_unit
        assert scheme.tokens_per_s == pytest.approx(units * scheme.batch / scheme.step_s)
        assert scheme.batch <= scheme.device.sequences
    times = plan.sidp.times
    assert times is not None
    assert plan.sidp.mode == "WAS"
    assert times.was_s == plan.sidp.step_s


def test_cas_is_shown_within_its_slots_and_decides_nothing() -> None:
    plan = qwen_plan()
    assert plan.cas is not None
    assert (plan.cas.mode, plan.rows()[-1]) == ("CAS", plan.cas)
    assert plan.cas.batch * (1 + 2048 / 512) <= 512 + 1e-9  # prompts in chunks: no step is larger than a slot
    assert {scheme.mode for scheme in plan.residency} == {"WAS"}
    assert (plan.mode, plan.best.mode, plan.thresholds.cas_below) == ("was", "WAS", None)
    assert plan.best in plan.residency
    assert (plan.best.device.items["CaS mailbox"], plan.cas.device.items["CaS mailbox"] > 0) == (0, True)
    assert any(
        "measured with up to 4 replicas, not with 8, and decides nothing" in warning for warning in plan.warnings
    )


@pytest.mark.parametrize(
    ("prompt", "output", "modes"),
    [(512, 2048, ("CAS", "CAS")), (8192, 1024, ("CAS", "WAS")), (2048, 540, ("WAS", "WAS"))],
)
def test_with_two_replicas_each_residency_is_in_its_faster_mode(
    prompt: int, output: int, modes: tuple[str, str]
) -> None:
    def plan(cas_rows: int) -> Plan:
        return Planner(QWEN, H200, 2, MemorySettings(max_rows=cas_rows)).plan(Workload(prompt, output))

    both = plan(512)
    assert (both.cas, both.sidp.mode, both.best.mode) == (None, *modes)
    words = "planned in CaS, prompts in chunks, in steps of up to 512 rows. How long replicas wait"
    assert any(words in warning for warning in both.warnings) == (both.best.mode == "CAS")
    assert not any("CaS" in warning for warning in plan(0).warnings)
    planner = Planner(QWEN, H200, 2)
    for k, scheme in enumerate(both.residency):
        either = [planner._sidp(Workload(prompt, output), k, cas=cas) for cas in (False, True)]
        assert scheme.tokens_per_s == max(found.tokens_per_s or 0 for found in either)
        assert scheme.times is not None
        assert scheme.step_s == (scheme.times.cas_s if scheme.mode == "CAS" else scheme.times.was_s)
        if scheme.mode == "CAS":
            assert scheme.batch * (1 + prompt / output) <= 512 + 1e-9


def test_the_plan_says_which_layers_to_keep() -> None:
    """In runs for two replicas in CaS, else at even distances."""

    def best(prompt: int, output: int, replicas: int = 2) -> Plan:
        chosen = MemorySettings(utilization=0.57, max_rows=256)
        return Planner(QWEN, H200, replicas, chosen, max_sequences=256).plan(Workload(prompt, output))

    plan = best(4096, 512)
    assert (plan.best.num_resident, plan.best.mode) == (10, "CAS")
    assert plan.resident_layers == list(range(54, 64))
    assert " on every replica (54-63), " in display._findings(plan)[0]
    assert plan.as_dict()["resident_layers"] == plan.resident_layers
    for plan, mode in ((best(8192, 64), "WAS"), (best(4096, 512, 4), "CAS")):
        count = plan.best.num_resident or 0
        assert plan.best.mode == mode
        assert plan.resident_layers == [layer * 64 // count for layer in range(count)]
    plan = replace(plan, best=plan.sidp)
    assert plan.resident_layers == []
    assert " layers on every replica, " in display._findings(plan)[0]


def test_bounds_of_the_engine_bound_the_batch() -> None:
    assert qwen_plan(max_sequences=10).sidp.batch == 10
    assert qwen_plan(step_tokens=100).sidp.batch == pytest.approx(20)  # each decoded token has 4 of a prompt beside it


@pytest.mark.parametrize("resident", [0, 20, 63])
def test_thresholds_are_where_the_predictions_cross(resident: int) -> None:
    planner, work = Planner(QWEN, H200, 8, MemorySettings(max_rows=4096)), Workload(2048, 512)
    found, part = planner.thresholds(work, resident), planner._streamed(resident)

    def times(load: StepLoad) -> step_time.StepTimes:
        return step_time.step_times(H200, QWEN, load, part, 8)

    assert replace(planner, settings=MemorySettings(max_rows=64)).thresholds(work, resident).cas_below == min(
        found.cas_below or 0, 65
    )
    assert found.hidden_from_sequences is not None
    assert found.hidden_from_prompt_tokens is not None
    assert (found.cas_below > 1) == (resident < 63)
    for tokens, holds in ((found.cas_below, True), (found.cas_below - 1, False)):
        if tokens == 0:
            continue
        load = StepLoad(tokens, 2304)
        assert (times(load).was_s <= times(load).cas_s) is holds
    for tokens, load, holds in (
        (found.hidden_from_sequences, StepLoad(found.hidden_from_sequences, 2304), True),
        (found.hidden_from_sequences - 1, StepLoad(found.hidden_from_sequences - 1, 2304), False),
        (found.hidden_from_prompt_tokens, StepLoad(0, 0, found.hidden_from_prompt_tokens, 2048), True),
        (found.hidden_from_prompt_tokens - 1, StepLoad(0, 0, found.hidden_from_prompt_tokens - 1, 2048), False),
    ):
        if tokens:
            assert (times(load).was_s <= 1.05 * times(load).work_s) is holds
    less = [planner.thresholds(work, k).hidden_from_sequences or 0 for k in (0, 20, 40, 63)]
    assert all(a >= b for a, b in pairwise(less))


def test_where_sidp_loses_the_plan_says_by_how_much() -> None:
    shape = ModelShape.read("meta-llama/Llama-3.1-8B")  # 15 GiB of 140: sharing them frees little and costs a stream
    plan = Planner(shape, H200, 8, max_sequences=64).plan(Workload(2048, 512))
    assert plan.speedup is not None
    assert plan.speedup < 1
    loss = f"SiDP loses {1 - plan.speedup:.1%} to plain DP"
    assert any(warning.startswith(loss) for warning in plan.warnings)


def test_what_fits_nowhere_is_refused_with_the_bytes_that_lack() -> None:
    small = replace(GpuProfile.read("H100"), memory_bytes=76 << 30)
    with pytest.raises(CapacityError, match=r"SiDP lacks \d+\.\d\d GiB a device") as caught:
        Planner(ModelShape.read("Qwen/Qwen2.5-72B"), small, 2).plan(Workload(2048, 512))
    lacking = caught.value.num_bytes
    assert lacking
    enough = replace(small, memory_bytes=small.memory_bytes + int(lacking / 0.9) + 1)
    plan = Planner(ModelShape.read("Qwen/Qwen2.5-72B"), enough, 2).plan(Workload(2048, 512))
    assert (plan.mode, plan.best.device.sequences) == ("was", 1)  # which needs least


def test_a_plan_where_only_sidp_and_tp_fit() -> None:
    plan = Planner(ModelShape.read("meta-llama/Llama-3.1-70B"), GpuProfile.read("H20"), 4).plan(Workload(128, 2048))
    assert (plan.dp.tokens_per_s, plan.speedup, plan.kv_gain) == (None, None, None)
    assert plan.dp.device.shortfall_bytes > 0
    assert plan.sidp.tokens_per_s
    assert any("datasheet" in warning for warning in plan.warnings)


def test_only_whole_heads_are_split() -> None:
    shape = ModelShape.from_config(RELEASED["Qwen2.5-7B"][0])  # 28 heads, 4 KV heads
    assert [s.devices_per_unit for s in Planner(shape, H200, 8).plan(Workload(100, 100)).tp] == [2, 4]


def test_a_workspace_below_the_activations_is_named() -> None:
    plan = qwen_plan(settings=MemorySettings(workspace_bytes=1 << 28))
    assert any("activations of a step need about 1." in warning for warning in plan.warnings)


@pytest.mark.parametrize("text", ["", "in=1", "in=1,out=x", "in=1,out=2,more=3", "in=0,out=1", "in=1;out=2"])
def test_a_workload_is_read_strictly(text: str) -> None:
    with pytest.raises(ConfigError, match="workload"):
        Workload.parse(text)


def test_a_planner_needs_two_replicas() -> None:
    with pytest.raises(ConfigError, match="2 or more"):
        Planner(QWEN, H200, 1)


def test_the_plan_in_the_readme_is_this_one() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    shown = text[text.index("8 devices together, predicted") :].partition("```")[0].splitlines()
    plan = Planner(QWEN, H200, 8).plan(Workload(512, 2048))
    table = display._speed(plan)
    rows = [" ".join(cells) for cells in zip(*(column.cells for column in table.columns), strict=True)]  # type: ignore[arg-type]
    words = [" ".join(row.split()) for row in rows if not row.startswith("TP4")]  # left out, as are three warnings
    assert [" ".join(line.split()) for line in shown[2:8]] == words
    said = [*display._findings(plan)[:2], *(f"warning: {warning}" for warning in plan.warnings)]
    assert "\n".join(shown[8:]).replace("\n", " ").strip() == " ".join([*said[:4], said[-1]])


COMMAND = ["plan", "--model", "Qwen/Qwen3-32B", "--gpu", "h200", "--replicas", "8", "--workload", "in=2048,out=512"]


def test_the_command_prints_tables() -> None:
    result = CliRunner(env={"COLUMNS": "150"}).invoke(cli.app, COMMAND)
    assert result.exit_code == 0, result.output
    for words in (
        "32.76 B parameters",
        "KV cache",
        "TP2 x DP4",
        "KV of SiDP: 1.74 x plain DP",
        f"{qwen_plan().best.num_resident} of 64 layers",
    ):
        assert words in result.output


def test_the_command_prints_json_that_adds_up() -> None:
    result = CliRunner().invoke(cli.app, [*COMMAND, "--json", "--utilization", "0.8", "--ring-slots", "3"])
    found = json.loads(result.output)
    assert found["settings"]["ring_slots"] == 3
    device = found["residency"][0]["device"]
    assert sum(device["items"].values()) == device["device_bytes"]
    assert found["best_resident_layers"] == found["best"]["num_resident"] == len(found["resident_layers"])
    assert len(found["residency"]) == 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--model", "nothing"], "bundled shapes"),
        (["--gpu", "H300"], "one of H200"),
        (["--replicas", "1"], "2 or more"),
        (["--workload", "many"], "in=2048,out=512"),
        (["--utilization", "2"], "utilization is 2.0"),
        (["--workspace-gib", "nan"], "workspace is nan"),
        (["--dtype", "float8"], "float8"),
    ],
)
def test_the_command_says_in_a_line_what_is_wrong(change: list[str], words: str) -> None:
    result = CliRunner().invoke(cli.app, [*COMMAND, *change])
    assert result.exit_code == 1
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_plot_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.backends.backend_agg"):  # another test may have imported the latter
        monkeypatch.setitem(sys.modules, name, None)
    result = CliRunner().invoke(cli.app, [*COMMAND, "--plot", str(tmp_path / "plan.png")])
    assert result.exit_code == 1
    assert "pip install 'sidp_runtime[plot]'" in result.stderr


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "plan.png"
    assert CliRunner().invoke(cli.app, [*COMMAND, "--plot", str(path)]).exit_code == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    result = CliRunner().invoke(cli.app, [*COMMAND, "--plot", str(tmp_path / "absent" / "plan.png")])
    assert result.exit_code == 1
    assert "cannot write the plot" in result.stderr
