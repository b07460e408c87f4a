"""``bench.decode_steps``: what it reads in logs of engines, and what it found against the planner."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from helpers.bench_results import RESULTS, runs

from bench import decode_steps
from sidp_runtime.planner import GpuProfile, ModelShape
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


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    """A run, and its logs in ``logs``: of both engines of each start, and of mode was, of what failed or is none."""
    folders = {
        "sidp-0-20": 5,
        "dp-0": 3,
        "tp-0": 4,
        "sidp-0-40": 6,
        "notes": 7,
        "sidp-0-24-auto": 8,
        "sidp-0-20-was": 9,
    }
    for folder, running in folders.items():
        for rank in (0, 1):
            log = tmp_path / "logs" / folder / f"engine-{rank}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("\n".join(line(0.0, 100.0 + rank, running, 50.0) for _ in range(2)))
    engine = {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]}}
    return {
        "cases": {"e2e_vllm": {"engine": engine, "sidp": {}, "world_size": 2}},
        "figures": [
            {"metric": "kv_of_an_engine", "subject": "sidp", "parameters": {"resident": 20}, "median": 130_000.0},
            {"metric": "kv_of_an_engine", "subject": "sidp", "parameters": {"resident": 24}, "median": 120_000.0},
            {
                "metric": "kv_of_an_engine",
                "subject": "sidp",
                "parameters": {"resident": 20, "mode": "was"},
                "median": 1000.0,
            },
            {"metric": "kv_of_an_engine", "subject": "dp", "parameters": {}, "median": 60_000.0},
            {"metric": "kv_of_an_engine", "subject": "tp", "parameters": {}, "median": 60_000.0},
            {"metric": "start", "subject": "sidp", "parameters": {"resident": 40}, "median": 90.0},
        ],
        "machine": {"gpus": ["NVIDIA H200", "NVIDIA H200"]},
        "shape": "qwen3-32b",
        **dict.fromkeys(("command", "time", "commit", "dirty", "versions", "settings"), "same"),
    }


def call(folder: Path, *runs: dict[str, Any], logs: str = "logs", model: str = QWEN) -> dict[str, Any]:
    words = ["--model", model, "--json", str(folder / "out.json")]
    for number, content in enumerate(runs):
        (folder / f"{number}.json").write_text(json.dumps(content))
        words += ["--run", str(folder / f"{number}.json"), str(folder / logs)]
    decode_steps.main(words)
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


def test_a_run_is_read_and_its_table_printed(
    run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = call(tmp_path, run)
    assert found["steps"] == [
        {"system": "dp", "resident": None, "sequences": 3, "rows": 4, "kv_tokens": [30_000] * 2, "ms": [30.0, 29.7]},
        {"system": "sidp", "resident": 20, "sequences": 5, "rows": 8, "kv_tokens": [65_000] * 2, "ms": [50.0, 49.5]},
        {"system": "sidp", "resident": 24, "sequences": 8, "rows": 8, "kv_tokens": [60_000] * 2, "ms": [80.0, 79.21]},
    ]
    assert (found["commit"], found["gpu"], found["replicas"]) == ("same", "H200", 2)
    assert found["runs"] == [{"command": "same", "time": "same", "settings": "same"}]
    assert [row.split(" | ")[0] for row in capsys.readouterr().out.splitlines()[2:]] == ["| plain DP", "| 20", "| 24"]


def test_layers_that_were_given_are_counted_and_larger_steps_were_in_was(run: dict[str, Any], tmp_path: Path) -> None:
    run["figures"][0]["parameters"] = {}
    del run["figures"][1:3]
    (tmp_path / "logs" / "sidp-0-20").rename(tmp_path / "logs" / "sidp-0")
    for rows, found in ((256, [None, 2]), (8, [None, 2]), (7, [None])):
        run["cases"]["e2e_vllm"]["sidp"] = {"resident_layers": [1, 5], "max_rows": rows}
        assert [step["resident"] for step in call(tmp_path, run)["steps"]] == found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": "llama"}, "a run is of llama, and the model is qwen3-32b"),
        ({"machine": {"gpus": ["NVIDIA A100"]}}, "no profile of NVIDIA A100"),
        ({"machine": {"gpus": []}}, "a machine without GPUs"),
        ({"cases": {}}, "it has no 'e2e_vllm'"),
        ({"cases": {"e2e_vllm": {"sidp": {"mode": "was"}}}}, "mode was"),
        ({"cases": {"e2e_vllm": {"sidp": {}, "engine": {}}}}, "it has no 'compilation_config'"),
        ({"figures": []}, "no line of the logs"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(
    run: dict[str, Any], change: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        call(tmp_path, run | change)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_other_bad_input_is_refused(run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = ["--model", QWEN, "--json", str(tmp_path / "out.json"), "--run", str(tmp_path / "none"), str(tmp_path)]
    for refused, words in (
        (lambda: call(tmp_path, run, logs="none"), "no line of the logs"),
        (lambda: call(tmp_path, run, {**run, "commit": "another"}), "the runs differ in commit"),
        (lambda: call(tmp_path, run, model="Nope/x"), "neither a directory"),
        (lambda: decode_steps.main(missing), "No such file"),
        (lambda: decode_steps.main([*missing, *missing[-3:]]), "given twice"),
    ):
        with pytest.raises(SystemExit):
            refused()
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out.json").exists()


def test_decode_steps_of_engines_are_as_planned() -> None:
    """Two vLLM engines in CaS on two H200, 2 to 200 sequences: with the waits within 7 %, without some always short.

    Plain DP on the same machines is within 6 %.
    """
    shape, gpu, off, short = ModelShape.read(QWEN), GpuProfile.read("H200"), [], []
    for step in (step for measured in runs("2x-nvidia-h200-decode-steps") for step in measured["steps"]):
        ms = median(step["ms"])
        times, remote = decode_steps.planned(shape, gpu, 2, step, round(median(step["kv_tokens"])))
        if step["system"] == "sidp":
            off.append(times.cas_s * 1e3 / ms - 1)
            if step["resident"] <= 20 or step["sequences"] == 200:
                short.append((times.cas_s - remote * CAS_WAIT_S) * 1e3 / ms - 1)
        else:
            assert times.local_s * 1e3 == pytest.approx(ms, rel=0.06)
    assert len(off) == 8
    assert max(map(abs, off)) <= 0.07, off
    assert median(map(abs, off)) <= 0.035, off
    assert max(short) < -0.03, short


def test_docs_show_the_table_of_the_results() -> None:
    head, *rows = (list(decode_steps.table(ModelShape.read(QWEN), m)) for m in runs("2x-nvidia-h200-decode-steps"))
    shown = "\n".join([*head, *(line for more in rows for line in more[2:])])
    assert f"\n{shown}\n" in (RESULTS.parents[1] / "docs" / "model.md").read_text(encoding="utf-8")
