"""``bench.decode_steps``: what it reads in logs of engines, and what it found against the planner."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from helpers.bench_results import runs

from bench import decode_steps
from sidp_runtime.planner import ModelShape
from sidp_runtime.planner.step_time import CAS_WAIT_S

QWEN = "Qwen/Qwen3-32B"


def line(prompts: float, generated: float, running: int, used: float, waiting: int = 0) -> str:
    return (
        f"INFO [loggers.py:271] Engine 000: Avg prompt throughput: {prompts} tokens/s, Avg generation throughput: "
        f"{generated} tokens/s, Running: {running} reqs, Waiting: {waiting} reqs, GPU KV cache usage: {used}%, "
        "Prefix cache hit rate: 0.0%"
    )


def test_lines_between_which_nothing_but_decoding_happened_count() -> None:
    lines = [
        "INFO [core.py:1] warm",
        line(0.0, 900.0, 8, 10.0),  # the first: nobody knows how many ran before
        line(0.0, 1000.0, 8, 20.0, waiting=3),
        line(50.0, 1000.0, 8, 30.0),  # a prompt
        line(0.0, 500.0, 8, 50.0),
        line(0.0, 500.0, 7, 60.0),  # one has ended
        line(0.0, 0.0, 7, 60.0),  # stood still
        line(0.0, 350.0, 7, 70.0),
    ]
    assert list(decode_steps.read_log(lines, 1000)) == [(8, 150, 8.0), (8, 400, 16.0), (7, 650, 20.0)]


def test_a_run_is_read_and_its_table_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both engines of a start together, each start apart; TP and what failed not at all."""
    sizes = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]}
    figures: list[dict[str, Any]] = [
        {"metric": "kv_of_an_engine", "subject": "sidp", "parameters": {"resident": 20}, "median": 130_000.0},
        {"metric": "kv_of_an_engine", "subject": "dp", "parameters": {}, "median": 60_000.0},
        {"metric": "kv_of_an_engine", "subject": "tp", "parameters": {}, "median": 60_000.0},
        {"metric": "start", "subject": "sidp", "parameters": {"resident": 40}, "median": 90.0},
    ]
    run = {"cases": {"e2e_vllm": {"engine": {"compilation_config": sizes}}}, "figures": figures, "command": "bench"}
    run |= dict.fromkeys(("time", "shape", "commit", "dirty", "machine", "versions", "settings"), "same")
    for folder, running in (("sidp-0-20", 5), ("dp-0", 3), ("tp-0", 4), ("sidp-0-40", 6), ("notes", 7)):
        for rank in (0, 1):
            log = tmp_path / "logs" / folder / f"engine-{rank}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("\n".join(line(0.0, 100.0 + rank, running, 50.0) for _ in range(2)))
    (tmp_path / "run.json").write_text(json.dumps(run))
    given = ["--model", QWEN, "--run", str(tmp_path / "run.json"), str(tmp_path / "logs")]
    decode_steps.main([*given, "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["steps"] == [
        {"system": "dp", "resident": None, "sequences": 3, "rows": 4, "kv_tokens": [30_000] * 2, "ms": [30.0, 29.7]},
        {"system": "sidp", "resident": 20, "sequences": 5, "rows": 8, "kv_tokens": [65_000] * 2, "ms": [50.0, 49.5]},
    ]
    assert (found["commit"], found["commands"]) == ("same", ["bench"])
    assert [row.split(" | ")[0] for row in capsys.readouterr().out.splitlines()[2:]] == ["| plain DP", "| 20"]
    settings = {"engine": {"compilation_config": sizes}, "sidp": {"resident_layers": [1, 5]}}
    given_layers = {**run, "cases": {"e2e_vllm": settings}, "figures": [{**figures[0], "parameters": {}}]}
    (tmp_path / "logs" / "sidp-0-20").rename(tmp_path / "logs" / "sidp-0")
    (step,) = decode_steps.read_run(given_layers, tmp_path / "logs")
    assert (step["system"], step["resident"], step["kv_tokens"]) == ("sidp", 2, [65_000] * 2)
    (tmp_path / "other.json").write_text(json.dumps({**run, "commit": "another"}))
    with pytest.raises(SystemExit):
        decode_steps.main(
            [*given, "--run", str(tmp_path / "other.json"), str(tmp_path / "logs"), "--json", str(tmp_path / "no.json")]
        )
    assert not (tmp_path / "no.json").exists()


def test_decode_steps_of_engines_are_as_planned() -> None:
    """Two vLLM engines in CaS on two H200, 2 to 200 sequences: with the waits within 6 %, without them all short."""
    (measured,) = runs("2x-nvidia-h200-decode-steps")
    shape, off, short = ModelShape.read(QWEN), [], []
    for step in measured["steps"]:
        ms = median(step["ms"])
        times, remote = decode_steps.planned(shape, step, round(median(step["kv_tokens"])))
        if step["system"] == "sidp":
            off.append(times.cas_s * 1e3 / ms - 1)
            short.append((times.cas_s - remote * CAS_WAIT_S) * 1e3 / ms - 1)
        else:
            assert times.local_s * 1e3 == pytest.approx(ms, rel=0.05)
    assert len(off) == 5
    assert max(map(abs, off)) <= 0.06, off
    assert abs(median(off)) <= 0.02, off
    assert max(short) < -0.03, short
