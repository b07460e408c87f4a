"""The mode that a plan has engines be given, and what is planned over plain DP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sidp_runtime.planner import GpuProfile, MemorySettings, ModelShape, Plan, Planner, Scheme, Workload, display

QWEN, H200 = ModelShape.read("Qwen/Qwen3-32B"), GpuProfile.read("H200")


def test_engines_get_mode_was_where_it_is_nearly_as_fast() -> None:
    def plan(workload: Workload, utilization: float, cas_rows: int = 256) -> Plan:
        chosen = MemorySettings(utilization=utilization, max_rows=cas_rows)
        return Planner(QWEN, H200, 2, chosen, max_sequences=256).plan(workload)

    def fastest(found: Plan) -> tuple[int, float]:
        rates = [scheme.tokens_per_s or 0.0 for scheme in found.residency]
        return rates.index(max(rates)), max(rates)

    other = plan(Workload(512, 2048, prompts=400), 0.90)  # nothing resident in CaS is 0.7 % faster
    count, rate = fastest(other)
    assert (count, other.mode, other.best.num_resident, other.best.mode) == (0, "was", 62, "WAS")
    assert 0.99 * rate <= (other.best.tokens_per_s or 0) < rate
    assert other.best == replace(
        plan(Workload(512, 2048, prompts=400), 0.90, 0).best, name="SiDP, 62 resident, mode was"
    )
    assert (other.rows()[-1], other.thresholds.cas_below) == (other.best, None)
    assert ", mode was, " in display._findings(other)[0]
    assert not any("CaS" in words for words in display._findings(other))
    slower = plan(Workload(8192, 64, prompts=24), 0.57)  # alone by more than 1 %
    alone = plan(Workload(8192, 64, prompts=24), 0.57, 0).best.tokens_per_s or 0
    count, rate = fastest(slower)
    assert (slower.mode, slower.best) == ("auto", slower.residency[count])
    assert alone < 0.99 * rate
    assert any("CaS" in words for words in display._findings(slower))


def test_mode_was_may_be_all_that_fits_or_have_nothing_resident() -> None:
    """It needs less memory with few replicas; and then it has a row of its own."""
    llama, h100 = ModelShape.read("meta-llama/Llama-3.1-70B"), GpuProfile.read("H100")
    fits = Planner(llama, H200, 2, MemorySettings(utilization=0.536)).plan(Workload(512, 2048))
    assert (fits.sidp.tokens_per_s, fits.mode, fits.best.num_resident) == (None, "was", 0)
    assert fits.best.tokens_per_s
    assert [scheme.name for scheme in fits.rows()][2:] == ["SiDP", "SiDP, mode was"]
    assert not any("does not fit" in warning for warning in fits.warnings)
    for rows, mode in ((512, "auto"), (0, "was")):
        nothing = Planner(llama, h100, 2, MemorySettings(max_rows=rows)).plan(Workload(512, 2048))
        assert (nothing.best.tokens_per_s, nothing.mode) == (None, mode)
        assert [scheme.name for scheme in nothing.rows()] == ["plain DP", "TP2", "SiDP"]


def test_mode_was_is_not_taken_where_it_alone_is_behind_plain_dp() -> None:
    settings = MemorySettings(utilization=0.622)
    plan = Planner(QWEN, H200, 3, settings, max_sequences=128).plan(Workload(4096, 512))
    alone = Planner(QWEN, H200, 3, replace(settings, max_rows=0), max_sequences=128).plan(Workload(4096, 512))
    rates = [found.best.tokens_per_s or 0.0 for found in (plan, alone)]
    assert 0.99 * rates[0] < rates[1] < (plan.dp.tokens_per_s or 0) < rates[0]
    assert plan.mode == "auto"
    assert not any("Run plain DP" in warning for warning in plan.warnings)


def test_the_docs_show_what_is_planned_over_plain_dp() -> None:
    cases = [Workload(*tokens) for tokens in ((2048, 512), (512, 2048), (8192, 1024), (256, 4096))]
    text = (Path(__file__).parents[2] / "docs" / "model.md").read_text(encoding="utf-8")

    def over(schemes: Sequence[Scheme], others: Sequence[Scheme], digits: int) -> str:
        pairs = zip(schemes, others, strict=True)
        return ", ".join(f"{(a.tokens_per_s or 0) / (b.tokens_per_s or 1):.{digits}f}" for a, b in pairs)

    for replicas in (2, 4, 8):
        alone = [Planner(QWEN, H200, replicas, MemorySettings(max_rows=0)).plan(case) for case in cases]
        plans = [Planner(QWEN, H200, replicas).plan(case) for case in cases]
        dp, best = [plan.dp for plan in plans], [plan.best for plan in plans]
        assert {plan.best.mode for plan in plans if plan.mode == "auto"} <= {"CAS"}
        cells = [
            f"{replicas} x H200",
            over([plan.best for plan in alone], dp, 3),
            over([plan.sidp for plan in alone], dp, 2),
            over(best, dp, 3),
            ", ".join(f"{plan.best.num_resident} {plan.mode}" for plan in plans),
            over([plan.tp[0] for plan in plans], best, 2),
            over([plan.cas for plan in plans if plan.cas], dp, 3) if replicas > 4 else "-",
        ]
        assert f"\n| {' | '.join(cells)} |\n" in text
