"""Jobs that end: vLLM's scheduler by hand, and what was measured of vLLM on two H200."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from helpers.bench_results import runs
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import e2e_vllm
from sidp_runtime.errors import ConfigError
from sidp_runtime.planner import GpuProfile, MemorySettings, ModelShape, Planner, StepLoad, Workload, job

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
    assert found is not None
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
    assert found is not None
    assert max(load.decode_rows for load in loads) == 2
    assert found.seconds == 30  # three times a prompt and nine steps


def test_who_came_last_makes_room_and_starts_again() -> None:
    """Room for six blocks: when both of two sequences need a fourth one is preempted, with 13 tokens of which it has
    yielded six; the last of them is not in the cache."""
    tight, loads = engine(room=24)
    found = tight.run([Workload(7, 9, 2)])
    assert found is not None
    assert found.preemptions == 1
    assert [load.prefill_rows for load in loads if load.prefill_rows] == [14, 13]
    assert found.tokens == 18


def test_a_prompt_in_chunks_makes_room_before_those_that_run() -> None:
    tight, loads = engine(room=40, step_tokens=10)
    found = tight.run([Workload(8, 20, 1), Workload(32, 4, 1)])
    assert found is not None
    assert found.tokens == 24
    assert found.preemptions == 0  # the short one never stops
    assert sum(load.prefill_rows for load in loads) > 40  # and what was begun of the long one was done twice


def test_sequences_beyond_the_room_fit_not() -> None:
    small, _ = engine(room=20)
    assert small.run([Workload(8, 4, 3)]) is not None
    assert small.run([Workload(8, 4, 3), Workload(8, 13, 1)]) is None


def test_steps_without_prompts_are_padded() -> None:
    padded, loads = engine(row_sizes=(1, 4))
    for prompts in (5, 4, 3, 1):
        padded.run([Workload(2, 3, prompts)])
    assert [load for load in loads if not load.prefill_rows] == [
        StepLoad(5, 4.0),
        StepLoad(4, 4.0),
        StepLoad(4, 3 * 4 / 4),
        StepLoad(1, 4.0),
    ]


def test_parts_lie_at_even_distances_and_replicas_have_as_many_of_each() -> None:
    mixed = job._mixed([Workload(1, 2, 12), Workload(1, 9, 4)], 2)
    assert [sequence.left for sequence in mixed] == [2, 2, 9, 2, 2, 2, 9, 2]
    assert len(job._mixed([Workload(1, 2, 12), Workload(1, 9, 1)], 2)) == 7
    longest = job._mixed([Workload(1, 2, 4_000_000), Workload(1, 9, 1)], 2)
    assert [[s.left for s in longest].count(left) for left in (2, 9)] == [job.MOST_PROMPTS, 1]
    between = [
        i for i, sequence in enumerate(job._mixed([Workload(1, 2, 95), Workload(1, 9, 5)], 1)) if sequence.left == 9
    ]
    assert all(19 <= b - a <= 21 for a, b in pairwise(between))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.builds(Workload, st.integers(1, 60), st.integers(1, 60), st.integers(1, 12)), min_size=1, max_size=3),
    st.integers(120, 400),
    st.integers(1, 40),
    st.integers(1, 8) | st.none(),
)
def test_every_job_ends_within_its_room(parts: list[Workload], room: int, step_tokens: int, most: int | None) -> None:
    made, loads = engine(room, step_tokens, max_sequences=most)
    run = job._Run(made, job._mixed(parts, 1))
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


def test_more_replicas_than_measured_ask_in_cas_for_a_job_too() -> None:
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


def rate(planner: Planner, system: str, resident: int, workload: str) -> float:
    """Tokens/s of all until the last one ends."""
    seconds, tokens, degree = [], 0.0, 2 if system == "tp" else 1
    for parts in dealt(workload, 2 // degree):
        mean = Workload.mean(parts)
        scheme = (
            planner._sidp_job(mean, parts, resident, cas=True)
            if system == "sidp"
            else planner._whole(mean, parts, degree)
        )
        made = sum(part.output_tokens * (part.prompts or 0) for part in parts)
        seconds.append(made / (scheme.tokens_per_s or 0))
        tokens += made * degree / 2
    return tokens / max(seconds)


def measured() -> list[tuple[str, str, int, str, float, float]]:
    """Workload, system, resident layers, the run, tokens/s measured, and predicted."""
    found = []
    for run in runs("2x-nvidia-h200"):
        case = run["cases"].get("e2e_vllm")
        if case is None or run["shape"] != "qwen3-32b" or case["weights"] != "dummy":
            continue
        old = run["commit"] in ("77b5d9dbc7c1", "029d0429ee17")  # before two mends of what CaS costs
        engine = case["engine"]
        memory = MemorySettings(utilization=engine["gpu_memory_utilization"])
        sizes = tuple(engine["compilation_config"]["cudagraph_capture_sizes"])
        planner = Planner(QWEN, H200, 2, memory, max_sequences=engine["max_num_seqs"], row_sizes=sizes)
        for figure in run["figures"]:
            system, workload = figure["subject"], figure["parameters"].get("workload")
            if figure["metric"] != "throughput" or not figure["samples"] or (old and system == "sidp"):
                continue
            resident = figure["parameters"].get("resident", len(case["sidp"].get("resident_layers", ())))
            expected = rate(planner, system, resident, workload)
            found.append((workload, system, resident, run["time"], figure["median"], expected))
    return found


def test_jobs_of_vllm_took_as_long_as_planned() -> None:
    """Qwen3-32B on two H200: rates within 10 %, and what SiDP has over plain DP within 6.5 %."""
    rows = measured()
    off = sorted(abs(expected / tokens - 1) for *_, tokens, expected in rows)
    assert len(off) >= 38, rows
    assert off[-1] < 0.10, rows
    assert off[len(off) // 2] < 0.03, rows
    dp = {(w, run): (tokens, expected) for w, system, _, run, tokens, expected in rows if system == "dp"}
    for workload, system, _, run, tokens, expected in rows:
        if system == "sidp":
            plain = dp[workload, run]
            assert (expected / plain[1]) / (tokens / plain[0]) == pytest.approx(1, abs=0.065), workload
