"""A job's vLLM engine: what it is started with, and how prompts reach it."""

from __future__ import annotations

import json
import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm runs these tests where it is")

import helpers.vllm_quiet  # noqa: F401 - before the others
from helpers.vllm_model import save_real_model

from sidp_runtime.errors import ConfigError
from sidp_runtime.job import JobConfig, runner, vllm_replica
from sidp_runtime.job.config import OWN_ENGINE_ARGUMENTS


def job_settings(**more: Any) -> dict[str, Any]:
    return {
        "rank": 0,
        "world_size": 2,
        "token": "ab",
        "store_host": "h",
        "store_port": 1,
        "backend": "host",
        "mode": "auto",
        "deadline_ms": 10,
        "step_rows": [8],
        "threads": 1,
        "dtype": "auto",
        "seed": 0,
        "checkpoint": {"root": "m"},
        "engine_arguments": {},
        **more,
    }


@pytest.fixture
def llm_arguments(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Of a job's engine, whose checkpoint is not looked at."""
    monkeypatch.setattr(vllm_replica.Checkpoint, "from_json", lambda given: SimpleNamespace(**given))
    return lambda **more: vllm_replica.llm_arguments(job_settings(**more))


def test_what_a_job_sets_itself_is_refused_by_name(llm_arguments: Callable[..., dict[str, Any]]) -> None:
    free = {"max_num_seqs", "enable_prefix_caching", "compilation_config"}
    assert set(llm_arguments()) - free == set(OWN_ENGINE_ARGUMENTS)
    for name in OWN_ENGINE_ARGUMENTS:
        with pytest.raises(ConfigError, match=rf"sets itself \({name}: give "):
            JobConfig("m", "p", "o", 2, engine="vllm", engine_arguments={name: 1})
    with pytest.raises(ConfigError, match="compilation_config must be"):
        JobConfig("m", "p", "o", 2, engine="vllm", engine_arguments={"compilation_config": "full"})


def test_a_jobs_engine_arguments_are_merged(
    monkeypatch: pytest.MonkeyPatch, llm_arguments: Callable[..., dict[str, Any]]
) -> None:
    from vllm.platforms import current_platform

    assert "compilation_config" not in llm_arguments()
    assert llm_arguments(engine_arguments={"max_num_seqs": 3})["max_num_seqs"] == 3
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    for given, expected in (
        ({"cudagraph_capture_sizes": [1]}, {"cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": [1]}),
        ({"cudagraph_mode": "NONE"}, {"cudagraph_mode": "NONE"}),
        (3, {"cudagraph_mode": "PIECEWISE", "mode": 3}),
    ):
        merged = llm_arguments(engine_arguments={"compilation_config": given})
        assert merged["compilation_config"] == expected


def test_an_engine_that_is_being_set_up_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    threads: list[str] = []

    def start(given: dict[str, Any]) -> None:
        threads.extend(thread.name for thread in threading.enumerate())
        raise Stop

    monkeypatch.setattr(vllm_replica, "_start", start)
    monkeypatch.setattr(vllm_replica.environment, "prepare_vllm", lambda: None)
    connection, inbox = multiprocessing.Pipe()[0], None
    with pytest.raises(Stop):
        vllm_replica._serve(job_settings(gpus=0), connection, inbox)  # type: ignore[arg-type]
    assert "starting" in threads  # see test_setting_up_is_progress_for_a_bounded_time
    assert "starting" not in {thread.name for thread in threading.enumerate()}


class CountingEngine:
    """Runs all that it was given, one token a step; a prompt's first token says how many."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.together: list[list[str]] = []

    def add_request(self, request_id: str, prompt: dict[str, list[int]], params: Any) -> None:
        self.left[request_id] = prompt["prompt_token_ids"][0]

    def step(self) -> list[Any]:
        self.together.append(sorted(self.left))
        outputs = []
        for name in list(self.left):
            self.left[name] -= 1
            answer = SimpleNamespace(token_ids=(7,), finish_reason="length")
            outputs.append(SimpleNamespace(request_id=name, finished=self.left[name] == 0, outputs=[answer]))
            if not self.left[name]:
                del self.left[name]
        return outputs


def test_batches_come_and_go_while_others_run() -> None:
    engine = CountingEngine()
    work = vllm_replica.Batches(engine, [2])
    work.add(4, [[3], [1]], 5)
    assert work.step() == []
    work.add(9, [[1]], 5)
    [(number, sequences, reasons, steps, seconds)] = work.step()
    assert (number, sequences, reasons, steps) == (9, [[7]], ["length"], 1)
    assert seconds >= 0
    assert list(work.unfinished) == [4]
    [(number, sequences, reasons, steps, seconds)] = work.step()
    assert (number, sequences, reasons, steps) == (4, [[7], [7]], ["length"] * 2, 3)
    assert not work.unfinished
    assert engine.together == [["4.0", "4.1"], ["4.0", "9.0"], ["4.0"]]


def test_a_jobs_engine_gets_one_prompt_at_a_time_and_the_dtype_as_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    given: dict[str, Any] = {}

    def launcher(world_size: int, settings: dict[str, Any], batches: list[Any], **more: Any) -> None:
        given.update(more, settings=settings, batches=batches)
        raise Stop

    monkeypatch.setattr(runner, "Launcher", launcher)
    model = save_real_model(tmp_path / "model", "float16")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}"}) + "\n" for i in range(9)))
    job = JobConfig(model, prompts, tmp_path / "out", 2, batch_size=8, engine="vllm")
    with pytest.raises(Stop):
        runner.run(job, target=print)
    assert given["settings"]["dtype"] == "auto"  # vLLM's own: float16 stays so
    assert given["settings"]["step_rows"] == [8]
    assert [len(batch.requests) for batch in given["batches"]] == [1] * 9
    assert given["most_held"] == 10
