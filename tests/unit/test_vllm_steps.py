"""The modes of a vLLM engine's steps: what is WaS whatever the policy would choose."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.noting_runtime import Began, Gpu

from sidp_runtime import Mode
from sidp_runtime._C import StepKind
from sidp_runtime.errors import ConfigError, UnsupportedError, UsageError
from sidp_runtime.integrations.vllm.step import StepState


def test_steps_beyond_the_largest_request_are_was_whatever_was_asked_for() -> None:
    runtime: Any = Began()
    state = StepState(runtime, 2, max_rows=8, configured=Mode.CAS)
    state.warming_up = False
    for rows, pin in ((8, None), (9, None), (4, Mode.WAS), (4, None)):
        state.pin(pin)
        state.begin(rows)
        state.end()
    assert runtime.modes == [Mode.CAS, Mode.WAS, Mode.WAS, Mode.CAS]


def test_the_warm_up_takes_no_steps_and_uses_no_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, gpu, state = whole_graphs(monkeypatch, Mode.CAS)
    state.computes = {(layer, "op"): lambda x, out=None: x + 1 for layer in (0, 1)}
    capture(gpu, state, 8)  # leaves the mode of its step behind
    runtime.calls.clear()
    state.begin(8)
    for layer in (0, 1):
        state.fetch(layer)
        assert state.compute(layer, "op", torch.zeros(1)) == 1
        state.release(layer)
    state.end()
    assert not runtime.calls
    state.warming_up = False
    state.begin(8)
    state.end()
    assert runtime.calls[-2:] == [(StepKind.RUN, 8, Mode.WAS), "end"]


def test_the_first_step_of_each_size_is_was_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime: Any = Began()
    waits: list[int] = []  # for the steps before: after how many
    stream = SimpleNamespace(synchronize=lambda: waits.append(len(runtime.modes)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    state = StepState(runtime, 2, max_rows=8, configured=Mode.CAS, first_is_was=True)
    state.begin(8)  # of the warm-up
    state.end()
    state.warming_up = False
    for rows in (8, 8, 4, 8, 4, 9, 9, 10):
        state.begin(rows)
        state.end()
    assert runtime.modes == [Mode.WAS, Mode.CAS, Mode.WAS, Mode.CAS, Mode.CAS, Mode.WAS, Mode.WAS, Mode.WAS]
    assert all(runtime.counted)
    assert waits == [0, 2, 5], (
        "9 rows are WaS anyway, but their kernels are new too; before 10 nothing waits for answers"
    )


def whole_graphs(monkeypatch: pytest.MonkeyPatch, configured: Mode | None = None) -> tuple[Any, Gpu, StepState]:
    runtime: Any = Began()
    state = StepState(runtime, 2, max_rows=8, configured=configured, first_is_was=True)
    state.computes[0, "op"] = lambda x, out=None: x
    return runtime, Gpu(monkeypatch, runtime), state


def capture(gpu: Gpu, state: StepState, rows: int, graph: object = None) -> None:
    gpu.capturing = True
    state.begin(rows, graph or f"of {rows}")
    state.end()
    gpu.capturing = False


def test_a_captured_step_keeps_the_mode_that_was_predicted_or_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    for configured, modes in (
        (None, {4: Mode.CAS, 8: Mode.WAS, 16: Mode.WAS}),
        (Mode.CAS, {4: Mode.CAS, 8: Mode.CAS, 16: Mode.WAS}),
        (Mode.WAS, dict.fromkeys((4, 8, 16), Mode.WAS)),
    ):
        runtime, gpu, state = whole_graphs(monkeypatch, configured)
        for rows in modes:
            capture(gpu, state, rows)
        captured = [(StepKind.CAPTURE, rows, mode) for rows, mode in modes.items()]
        assert runtime.calls == [call for step in captured for call in (step, "end")], "of the warm-up, and whole"
        state.warming_up = False
        for rows in (16, 4):
            runtime.calls.clear()
            begun = state.launch(f"of {rows}", rows, lambda calls=runtime.calls: calls[-2:])
            assert begun == [(StepKind.REPLAY, rows, modes[rows]), "check"]


def test_an_engine_without_requests_captures_none(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, gpu, state = whole_graphs(monkeypatch)
    state.computes.clear()
    capture(gpu, state, 4)
    assert runtime.calls == [(StepKind.CAPTURE, 4, Mode.WAS), "end"]


def test_a_graph_is_launched_within_a_step_and_its_first_launch_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, gpu, state = whole_graphs(monkeypatch)
    launched = [(StepKind.REPLAY, 4, Mode.CAS), "check", "launch", "launched", "end"]
    for _ in range(2):  # captured anew, as vLLM measured the first one and dropped it
        capture(gpu, state, 4)
        for expected in (["wait", *launched, "wait"], launched):
            runtime.calls.clear()
            state.launch("of 4", 4, lambda: runtime.calls.append("launch"))
            assert runtime.calls == expected


def test_new_prompts_wait_for_a_graph_of_requests_and_not_for_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, gpu, state = whole_graphs(monkeypatch)
    capture(gpu, state, 4)  # CaS
    capture(gpu, state, 8)  # WaS
    state.warming_up = False
    for rows in (4, 8):
        state.launch(f"of {rows}", rows, lambda: None)  # the first: waited for
    for graph, prompt, waits in ((None, 20, 0), (4, 21, 1), (None, 22, 0), (8, 23, 0), (4, 23, 0), (8, 24, 1)):
        runtime.calls.clear()
        if graph is not None:
            state.launch(f"of {graph}", graph, lambda: None)
        state.begin(prompt)
        state.end()
        assert runtime.calls.count("wait") == waits, (graph, prompt)


def test_a_launch_that_fails_breaks_its_step_off(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, gpu, state = whole_graphs(monkeypatch)
    capture(gpu, state, 4)
    runtime.calls.clear()

    def fail() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        state.launch("of 4", 4, fail)
    assert runtime.calls[-2:] == ["check", "broken off"]


def test_a_call_that_raised_does_not_hide_the_next_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, gpu, state = whole_graphs(monkeypatch)
    capture(gpu, state, 4)
    state.warming_up = False
    for capturing in (False, True):
        gpu.capturing = capturing
        runtime.calls.clear()
        state.begin(8, "of 8")
        gpu.capturing = False
        state.launch("of 4", 4, lambda: None)
        assert runtime.calls.index("broken off") <= 2, "of its own step, before the next"
        assert (StepKind.REPLAY, 4, Mode.CAS) in runtime.calls
        state.begin(9)
        state.end()
        assert runtime.calls[-2:] == [(StepKind.RUN, 9, None), "end"]
        assert "of 8" not in state._graphs


def test_graphs_that_could_not_be_followed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, gpu, state = whole_graphs(monkeypatch)
    state.pin(Mode.WAS)
    state.pin(None)
    capture(gpu, state, 4)
    with pytest.raises(ConfigError, match="1 full CUDA graphs keep the mode"):
        state.pin(Mode.WAS)
    with pytest.raises(UsageError, match="of 8 tokens that was captured outside"):
        state.launch("of 8", 8, lambda: pytest.fail("it was launched"))
    gpu.capturing = True
    with pytest.raises(UnsupportedError, match="not as one of its full CUDA graphs"):
        state.begin(8, None)
