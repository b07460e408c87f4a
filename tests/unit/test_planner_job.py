"""Jobs that end: vLLM's scheduler by hand, and what was measured of vLLM on two H200."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from helpers.bench_results import RESULTS, runs
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import e2e_vllm
from sidp_runtime.errors import CapacityError, ConfigError
from sidp_runtime.planner import (
    GpuProfile,
    MemorySettings,
    ModelShape,
    Planner,
    StepLoad,
    Workload,
    display,
    job,
)

BLOCK = 4
KV_BYTES = [-(-tokens // BLOCK) * BLOCK for tokens in range(1001)]  # a byte a token
QWEN, H200 = ModelShape.read("Qwen/Qwen3-32B"), GpuProfile.read("H200")


def engine(room: int = 1000, step_tokens: int = 100, **more: Any) -> tuple[job.Engine, list[StepLoad]]:
    """A step of one second; and the loads that it was asked for."""
    loads: list[StepLoad] = []

    def step(load: StepLoad) -> tuple[float, bool]:
        loads.append(load)
        return 1.0, load.prefill_rows == 0

    return job.Engine(KV_BYTES, room, step, step_tokens, **more), loads


def test_a_sequence_by_hand() -> None:
    alone, loads = engine(step_tokens=6)
    found = alone.run([Workload(10, 41, 1)])
    # 6 and 4 tokens of the prompt, of which the second yields a token; 32 steps as one, 8 as one
    assert found == job.JobTime(seconds=42, cas_seconds=40, tokens=41, steps=42, preemptions=0)
    assert loads == [
        StepLoad(0, 0, 6, 10),
        StepLoad(0, 0, 4, 10),
        StepLoad(1, 11 + 16, 0, 1),
        StepLoad(1, 11 + 32 + 4, 0, 1),
    ]


def test_prompts_come_beside_what_runs_as_far_as_the_step_holds_them() -> None:
    both, loads = engine(step_tokens=6)
    found = both.run([Workload(4, 3, 2)])
    assert (found.seconds, found.tokens) == (4, 6)
    assert loads == [
        StepLoad(0, 0, 6, 4),
        StepLoad(1, 5.5, 2, 4),
        StepLoad(2, (6.5 + 5.5) / 2, 0, 1),
        StepLoad(1, 6.5, 0, 1),
    ]


def test_no_more_run_than_may() -> None:
    two, loads = engine(max_sequences=2)
    found = two.run([Workload(4, 10, 5)])
    assert max(load.decode_rows for load in loads) == 2
    assert found.seconds == 30  # three times a prompt and nine steps


def test_who_came_last_makes_room_and_starts_again() -> None:
    """Room for six blocks: when both of two sequences need a fourth one is preempted, with 13 tokens of which it has
    yielded six; the last of them is not in the cache."""
    tight, loads = engine(room=24)
    found = tight.run([Workload(7, 9, 2)])
    assert found.preemptions == 1
    assert [load.prefill_rows for load in loads if load.prefill_rows] == [14, 13]
    assert found.tokens == 18


def test_a_prompt_in_chunks_makes_room_before_those_that_run() -> None:
    tight, loads = engine(room=48, step_tokens=4)
    found = tight.run([Workload(8, 20, 1), Workload(32, 4, 1)])
    assert found.tokens == 24
    assert found.preemptions == 1
    assert sum(load.prefill_rows for load in loads) > 40  # and what was begun of the long one was done twice


def test_a_prompt_is_begun_where_all_of_it_fits_and_not_in_a_step_that_preempts() -> None:
    tight, loads = engine(room=40, step_tokens=10)
    found = tight.run([Workload(8, 20, 1), Workload(32, 4, 1)])
    assert (found.preemptions, sum(load.prefill_rows for load in loads)) == (0, 40)
    full, loads = engine(room=16)
    full.run([Workload(3, 10, 3), Workload(1, 1, 1)])
    assert all(load.decode_rows + load.prefill_rows > 0 for load in loads)
    first = next(i for i in range(1, len(loads)) if loads[i].decode_rows < loads[i - 1].decode_rows)
    assert loads[first].prefill_rows == 0


def test_sequences_beyond_the_room_fit_not() -> None:
    small, _ = engine(room=20)
    assert small.run([Workload(8, 4, 3)]).tokens == 12
    with pytest.raises(ConfigError, match="a sequence needs 24 bytes of KV, and there is room for 20"):
        small.run([Workload(8, 4, 3), Workload(8, 13, 1)])


def test_steps_without_prompts_are_padded() -> None:
    padded, loads = engine(row_sizes=(1, 4))
    for prompts in (5, 4, 3, 1):
        padded.run([Workload(2, 3, prompts)])
    assert [(load.decode_rows, load.padding_rows) for load in loads if not load.prefill_rows] == [
        (5, 0),
        (4, 0),
        (3, 1),
        (1, 0),
    ]
    assert {load.context for load in loads if not load.prefill_rows} == {4.0}
    assert {load.padding_rows for load in loads if load.prefill_rows} == {0}
    for wrong in ((8, 1), (0, 4), (4, 4)):
        with pytest.raises(ConfigError, match="must be above 0 and ascend"):
            Planner(QWEN, H200, 2, row_sizes=wrong)


def test_parts_lie_at_even_distances() -> None:
    mixed = job._mixed([Workload(1, 2), Workload(1, 9)], [6, 2])
    assert [sequence.left for sequence in mixed] == [2, 2, 9, 2, 2, 2, 9, 2]
    between = [i for i, s in enumerate(job._mixed([Workload(1, 2), Workload(1, 9)], [95, 5])) if s.left == 9]
    assert all(19 <= b - a <= 21 for a, b in pairwise(between))


def test_the_replica_with_the_most_prompts_counts() -> None:
    one, _ = engine(max_sequences=1)
    found = [one.run([Workload(4, 3, prompts)], 4) for prompts in (1, 4, 5, 8)]
    assert [time.seconds for time in found] == [3, 3, 6, 6]
    planner = Planner(QWEN, H200, 2, MemorySettings(max_rows=0))
    alone, two = (planner.plan(Workload(64, 64, prompts)) for prompts in (1, 2))
    assert two.dp.tokens_per_s == pytest.approx(2 * (alone.dp.tokens_per_s or 0))  # one of two GPUs has nothing to do
    assert (two.tp[0].tokens_per_s or 0) / (alone.tp[0].tokens_per_s or 1) == pytest.approx(2, rel=0.02)


def test_long_jobs_are_drawn_out_from_shorter_ones_with_all_that_is_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    assert job.scaled([3, 100], 512) == [3, 100]
    assert job.scaled([90_000, 10_000, 3], 512) == [461, 51, 3]
    made, _ = engine(room=300, max_sequences=16)
    parts = [Workload(20, 7, 900), Workload(30, 60, 40), Workload(9, 100, 2)]
    short = made.run(parts)
    monkeypatch.setattr(job, "MOST_PROMPTS", 10_000)
    whole = made.run(parts)
    assert short.tokens == pytest.approx(whole.tokens)
    for name in ("seconds", "cas_seconds", "steps"):
        assert vars(short)[name] == pytest.approx(vars(whole)[name], rel=0.05)


def test_jobs_that_cannot_be_followed_are_refused() -> None:
    one, _ = engine(step_tokens=1)
    with pytest.raises(ConfigError, match=r"a job of 400 prompts and 400 tokens a replica takes more than 50000 steps"):
        one.run([Workload(200, 1, 400)])
    with pytest.raises(ConfigError, match="needs prompts="):
        one.run([Workload(1, 1)])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.builds(Workload, st.integers(1, 60), st.integers(1, 60), st.integers(1, 12)), min_size=1, max_size=3),
    st.integers(120, 400),
    st.integers(1, 40),
    st.integers(1, 8) | st.none(),
)
def test_every_job_ends_within_its_room(parts: list[Workload], room: int, step_tokens: int, most: int | None) -> None:
    made, loads = engine(room, step_tokens, max_sequences=most)
    run = job._Run(made, job._mixed(parts, [part.prompts or 0 for part in parts]))
    take, over = run._yield, []

    def watched(count: int, ready: list[Any]) -> None:
        take(count, ready)
        over.append(
            run.used - sum(KV_BYTES[s.context - 1] for s in run.running) - sum(KV_BYTES[s.filled] for s in run.waiting)
        )
        over.append(max(0, run.used - room))

    run._yield = watched  # type: ignore[method-assign]
    found = run.to_the_end()
    assert found.tokens == sum((part.prompts or 0) * part.output_tokens for part in parts)
    assert found.seconds == found.steps >= max(part.output_tokens for part in parts)
    assert not any(over)
    bound = min(most or step_tokens, step_tokens)
    assert all(load.decode_rows <= bound and load.decode_rows + load.prefill_rows <= step_tokens for load in loads)


def test_a_job_without_a_tail_is_the_endless_queue() -> None:
    """Nearly: prompts of one length come and go together, and so not beside steps that wait for memory."""
    planner = Planner(QWEN, H200, 2, max_sequences=32)
    endless, long = planner.plan(Workload(16, 512)), planner.plan(Workload(16, 512, 1024))
    for one, other in ((long.dp, endless.dp), (long.sidp, endless.sidp)):
        assert one.tokens_per_s is not None
        assert 0.97 < one.tokens_per_s / (other.tokens_per_s or 0) <= 1.001


def test_a_tail_is_for_resident_layers() -> None:
    planner = Planner(QWEN, H200, 2, MemorySettings(utilization=0.57), max_sequences=256)
    mixed = planner.plan(Workload(512, 128, 152), Workload(512, 4096, 8))
    assert mixed.workload == Workload(512, 326, 160)
    assert (mixed.best.num_resident, mixed.best.mode) == (62, "WAS")
    assert mixed.speedup is not None
    assert 0.97 < mixed.speedup < 1
    assert planner.plan(Workload(512, 2048, 208)).best.num_resident == 0


def test_a_part_that_does_not_fit_is_named() -> None:
    planner = Planner(QWEN, H200, 2, MemorySettings(utilization=0.57))
    plan = planner.plan(Workload(512, 128, 20), Workload(100_000, 1000, 1))  # in SiDP's room, not in DP's
    assert (plan.dp.tokens_per_s, plan.dp.step_s, plan.dp.batch, plan.speedup) == (None, None, 0, None)
    assert plan.sidp.tokens_per_s is not None
    lost = planner.plan(Workload(512, 128, 20), Workload(185_000, 1000, 1))  # in TP2's alone
    assert any("SiDP does not fit a sequence of 186000 tokens" in warning for warning in lost.warnings)
    with pytest.raises(CapacityError, match="no scheme has room for one sequence of 4001000 tokens") as refused:
        planner.plan(Workload(512, 128, 20), Workload(4_000_000, 1000, 1))
    assert (refused.value.num_bytes or 0) > 0


def test_the_plan_of_a_job_names_its_parts() -> None:
    plan = Planner(QWEN, H200, 2).plan(Workload(64, 16, 3), Workload(64, 32, 1))
    assert display._job(plan) == (
        "a job of 3 prompts of 64 tokens in and 16 out and 1 prompts of 64 tokens in and 32 out (steps: of an endless "
        "queue of their mean)"
    )
    assert [part["prompts"] for part in plan.as_dict()["job"]] == [3, 1]
    endless = Planner(QWEN, H200, 2).plan(Workload(64, 16))
    assert (display._job(endless), endless.job) == ("", ())


def test_more_replicas_than_measured_ask_in_cas_for_a_job_too() -> None:
    assert Planner(QWEN, H200, 8).plan(Workload(8192, 16, 64)).cas is None  # nearly all of it is prompts
    plan = Planner(QWEN, H200, 8, max_sequences=16).plan(Workload(64, 64, 64))
    assert {scheme.mode for scheme in plan.residency} == {"WAS"}
    assert plan.cas is not None
    assert (plan.cas.mode, plan.cas.name[-1]) == ("CAS", "*")


def test_workloads_are_read_and_put_together() -> None:
    assert Workload.parse("in=1,out=2,prompts=3") == Workload(1, 2, 3)
    assert Workload.mean([Workload(1, 2)]) == Workload(1, 2)
    for wrong, words in (
        (lambda: Workload.parse("in=1,out=2,prompts=0"), "has 0 prompts"),
        (lambda: Workload.parse("in=1,prompts=2"), "not of the form"),
        (
            lambda: Workload.mean([Workload(1, 2), Workload(1, 2, 3)]),
            "of 2 workloads together each must have prompts=; 1 ",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            wrong()


@cache
def asked(workload: str) -> list[tuple[int, int]]:
    """Tokens in and out of the prompts of ``bench.e2e_vllm``'s first sample."""
    return [(len(ids), new) for ids, new in e2e_vllm.requests(workload, 0, QWEN.vocab)]


def dealt(workload: str, units: int) -> list[list[Workload]]:
    """Of each unit of GPUs what it was dealt, times ``units``."""
    counts = [Counter(asked(workload)[rank::units]) for rank in range(units)]
    return [[Workload(*tokens, units * count) for tokens, count in sorted(of.items())] for of in counts]


def rate(planner: Planner, system: str, resident: int, workload: str, *, cas: bool) -> float:
    """Tokens/s of all until the last one ends."""
    seconds, tokens, degree = [], 0.0, 2 if system == "tp" else 1
    for parts in dealt(workload, 2 // degree):
        mean = Workload.mean(parts)
        scheme = (
            planner._sidp_job(mean, parts, resident, cas=cas)
            if system == "sidp"
            else planner._whole(mean, parts, degree)
        )
        made = sum(part.output_tokens * (part.prompts or 0) for part in parts)
        seconds.append(made / (scheme.tokens_per_s or 0))
        tokens += made * degree / 2
    return tokens / max(seconds)


class Row(NamedTuple):
    """Of a run of vLLM: tokens/s, and as planned."""

    workload: str
    system: str
    resident: int
    mode: str
    utilization: float
    run: str
    measured: float
    planned: float


@cache
def measured() -> list[Row]:
    found = []
    for run in runs("2x-nvidia-h200"):
        case = run["cases"].get("e2e_vllm")
        if case is None or run["shape"] != "qwen3-32b" or case["weights"] != "dummy":
            continue
        old = run["commit"] in ("77b5d9dbc7c1", "029d0429ee17")  # before two mends of what CaS costs
        engine = case["engine"]
        utilization = engine["gpu_memory_utilization"]
        sizes = tuple(engine["compilation_config"]["cudagraph_capture_sizes"])
        for figure in run["figures"]:
            system, workload = figure["subject"], figure["parameters"].get("workload")
            if figure["metric"] != "throughput" or not figure["samples"] or (old and system == "sidp"):
                continue
            resident = figure["parameters"].get("resident", len(case["sidp"].get("resident_layers", ())))
            mode = figure["parameters"].get("mode", "auto")
            cas = mode == "auto"
            memory = MemorySettings(utilization=utilization, **({} if cas else {"max_rows": 0}))
            planner = Planner(QWEN, H200, 2, memory, max_sequences=engine["max_num_seqs"], row_sizes=sizes)
            planned = rate(planner, system, resident, workload, cas=cas)
            found.append(Row(workload, system, resident, mode, utilization, run["time"], figure["median"], planned))
    return found


def over_dp() -> list[tuple[Row, float, float]]:
    """SiDP's rows, and what they have over plain DP of the same run: planned, and measured."""
    dp = {(row.workload, row.run): row for row in measured() if row.system == "dp"}
    pairs = [(row, dp[row.workload, row.run]) for row in measured() if row.system == "sidp"]
    return [(row, row.planned / plain.planned, row.measured / plain.measured) for row, plain in pairs]


def test_jobs_of_vllm_took_as_long_as_planned() -> None:
    """Qwen3-32B on two H200: rates within 10 %, 2.5 % in the median, and what SiDP has over plain DP within 6.5 %."""
    off = sorted(abs(row.planned / row.measured - 1) for row in measured())
    assert len(off) == 50
    assert off[-1] < 0.10
    assert off[len(off) // 2] < 0.025
    for row, planned, found in over_dp():
        assert planned / found == pytest.approx(1, abs=0.065), row


def test_docs_show_these_jobs() -> None:
    lines = []
    for row, planned, found in over_dp():
        memory = MemorySettings(utilization=row.utilization)
        mean = Workload.mean(e2e_vllm.job(row.workload))
        endless = Planner(QWEN, H200, 2, memory, max_sequences=256).plan(replace(mean, prompts=None))
        ratio = (endless.residency[row.resident].tokens_per_s or 0) / (endless.dp.tokens_per_s or 1)
        length, out, count, *long = e2e_vllm.numbers(row.workload)
        name = f"{length}, {out}{f' or (5 %) {long[0]}' if long else ''}, {count}"
        resident = f"{row.resident}{'' if row.mode == 'auto' else f', mode {row.mode}'}"
        cells = (f"{row.utilization:.2f}", name, resident, f"{planned:.3f}", f"{found:.3f}", f"{ratio:.2f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    assert "\n".join(lines) in (RESULTS.parents[1] / "docs" / "model.md").read_text(encoding="utf-8")
