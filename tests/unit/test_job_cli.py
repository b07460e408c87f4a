"""The sidp command: one clear line for what is wrong, before anything starts, and a quick --help."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sidp_runtime import cli, doctor, job
from sidp_runtime.errors import ConfigError, PeerDeadError
from sidp_runtime.job import JobConfig, JobInterrupted, JobReport

pytestmark = pytest.mark.unit


def sidp(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def options(tmp_path: Path) -> list[object]:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    (tmp_path / "model").mkdir()
    out = tmp_path / "out.jsonl"
    return ["generate", "--model", tmp_path / "model", "--prompts", prompts, "--out", out, "--replicas", 2]


def test_help_names_the_commands() -> None:
    result = sidp("--help")
    assert result.exit_code == 0
    for command in ("generate", "doctor", "plan", "bench"):
        assert command in result.output


def test_import_is_quick_and_brings_no_engine() -> None:
    code = "import sys, sidp_runtime.cli; sys.exit(sum(name in sys.modules for name in ('torch', 'transformers')))"
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert time.perf_counter() - begin < 5  # only against the seconds that torch takes; machines differ


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--backend", "smoke"], "backend 'smoke' is not in this build"),
        (["--prompts", "absent.jsonl"], "cannot be read"),
        (["--model", "absent"], "does not exist"),
        ([], "has no model files"),
        (["--out", "absent/out.jsonl"], "does not exist: make it"),
        (["--out", "."], "is a directory"),
        (["--report", "absent/r.json"], "does not exist: make it"),
    ],
)
def test_wrong_input_is_one_line(options: list[object], change: list[object], words: str) -> None:
    result = sidp(*options, *change)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_results_over_prompts(options: list[object]) -> None:
    result = sidp(*options, "--out", options[4])
    assert result.exit_code == 1
    assert "is the prompts file" in result.stderr
    assert Path(str(options[4])).read_text() == '{"prompt": "a"}\n'


def test_debug_shows_the_error_itself(options: list[object]) -> None:
    result = sidp(*options, "--debug")
    assert type(result.exception).__name__ == "CheckpointError"


@pytest.mark.parametrize("change", [["--replicas", 0], ["--mode", "fast"], ["--dtype", "int8"], ["--batch-size", "x"]])
def test_wrong_options_are_usage_errors(options: list[object], change: list[object]) -> None:
    assert sidp(*options, *change).exit_code == 2


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("first\nsecond"), 1, "error: first second\n"),
        (PeerDeadError("all gone"), 1, "error: all gone\n"),
        (JobInterrupted(2), 130, "error: stopped by SIGINT"),
        (JobInterrupted(15), 143, "error: stopped by SIGTERM"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (ZeroDivisionError("oops"), 1, "error: internal: ZeroDivisionError: oops"),
    ],
)
def test_exit_codes(
    options: list[object], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    def fail(*values: Any) -> None:
        raise error

    monkeypatch.setattr(job, "run", fail)
    result = sidp(*options)
    assert result.exit_code == code
    assert result.stderr.startswith(words)


def test_options_reach_the_job(options: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[JobConfig] = []

    def record(config: JobConfig, on_event: object) -> JobReport:
        seen.append(config)
        return JobReport("m", "o", 2, "cas", "float32", 8, 1, 1, 1, 0, 0, 0.0, 0.0, 0, [], [])

    monkeypatch.setattr(job, "run", record)
    more = "--mode cas --batch-size 8 --max-new-tokens 7 --dtype bfloat16 --threads-per-replica 3 --deadline-ms 99"
    result = sidp(*options, *more.split(), "--seed", 5, "--overwrite", "--report", "r.json", "--silence-ms", 700)
    assert result.exit_code == 0, result.output
    (config,) = seen
    assert (config.mode, config.batch_size, config.max_new_tokens, config.dtype) == ("cas", 8, 7, "bfloat16")
    assert (config.threads_per_replica, config.deadline, config.seed, config.overwrite) == (3, 99, 5, True)
    assert (config.report, config.silence_ms, config.replicas) == (Path("r.json"), 700, 2)


@pytest.mark.parametrize(
    "values",
    [{"mode": "x"}, {"dtype": "x"}, {"replicas": 0}, {"batch_size": 0}, {"max_new_tokens": 0}, {"deadline_ms": 1}],
)
def test_configuration_is_checked(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=str(next(iter(values)))):
        JobConfig(**{"model": "m", "prompts": "p", "out": "o", "replicas": 1, **values})


def test_deadline_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDP_DEADLINE_MS", "1234")
    assert JobConfig("m", "p", "o", 1).deadline == 1234


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "measure_memcpy_gbps", lambda: 1.0)
    result = sidp("doctor", "--json")
    assert result.exit_code == doctor.report().exit_code
    assert json.loads(result.stdout)["machine"]["cores"] >= 1
    assert "Backends" in sidp("doctor").stdout


def test_bench_of_an_unknown_backend() -> None:
    result = sidp("bench", "run", "--backend", "smoke")
    assert result.exit_code == 1
    assert "none of" in result.stderr
    assert "runs on backend 'smoke'" in result.stderr
