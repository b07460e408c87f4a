"""The modes of a vLLM engine's steps: what is WaS whatever the policy would choose."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sidp_runtime import Mode
from sidp_runtime._C import StepKind
from sidp_runtime.errors import ConfigError, UnsupportedError
from sidp_runtime.integrations.vllm.step import StepState


class Began:
    """A runtime that only notes what is called: in which mode a step begins, and whether it counts."""

    def __init__(self) -> None:
        self.modes: list[Any] = []
        self.counted: list[bool] = []
        self.calls: list[Any] = []
        self.pool = self._core = self

    def is_local(self, layer: int) -> bool:
        return False

    def _stream(self, stream: object) -> int:
        return 0

    def begin_step(self, num_tokens: int, stream: int, kind: Any, mode: Any) -> Any:
        self.modes.append(mode)
        self.calls.append((kind, num_tokens, mode))
        return SimpleNamespace(mode=mode)

    def end_step(self, broken_off: bool = False) -> None:
        self.counted.append(not broken_off)
        self.calls.append("broken off" if broken_off else "end")

    def predicted_modes(self, sizes: list[int]) -> dict[int, Mode]:
        return {size: Mode.CAS if size < 6 else Mode.WAS for size in sizes}

    def check_launch(self) -> None:
        self.calls.append("check")

    def launched(self) -> None:
        self.calls.append("launched")


def test_steps_beyond_the_largest_request_are_was_whatever_was_asked_for() -> None:
    runtime: Any = Began()
    state = StepState(runtime, 2, max_rows=8, configured=Mode.CAS)
    state.warming_up = False
    for rows, pin in ((8, None), (9, None), (4, Mode.WAS), (4, None)):
        state.pin(pin)
        state.begin(rows)
        state.end()
    assert runtime.modes == [Mode.CAS, Mode.WAS, Mode.WAS, Mode.CAS]


def test_steps_of_the_warm_up_are_was_and_do_not_count() -> None:
    runtime: Any = Began()
    state = StepState(runtime, 2, max_rows=8, configured=Mode.CAS)
    for warming_up in (True, False):
        state.warming_up = warming_up
        state.begin(8)
        state.end()
    assert runtime.modes == [Mode.WAS, Mode.CAS]
    assert runtime.counted == [False, True]


def test_the_first_step_of_each_size_is_was_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime: Any = Began()
    waits: list[int] = []  # for the steps before: after how many
    stream = SimpleNamespace(synchronize=lambda: waits.append(len(runtime.modes)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    state = StepState(runtime, 2, max_rows=8, configured=Mode.CAS, first_is_was=True)
    state.begin(8)  # of the warm-up, where much of a step is left out
    state.end()
    state.warming_up = False
    for rows in (8, 8, 4, 8, 4):
        state.begin(rows)
        state.end()
    assert runtime.modes == [Mode.WAS, Mode.WAS, Mode.CAS, Mode.WAS, Mode.CAS, Mode.CAS]
    assert runtime.counted == [False, True, True, True, True, True]
    assert waits == [1, 3]


class Gpu:
    """torch's current stream: whether it is captured, and after how many calls of the runtime it was waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, runtime: Began) -> None:
        self.capturing = False
        stream = SimpleNamespace(synchronize=lambda: runtime.calls.append("wait"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)

    def capture(self, state: StepState, rows: int, graph: object = "uniform") -> None:
        state.graph_next((rows, graph))
        self.capturing = True
        state.begin(rows, graph)
        state.end()
        self.capturing = False


def whole_graphs(monkeypatch: pytest.MonkeyPatch, configured: Mode | None = None) -> tuple[Any, Gpu, StepState]:
    runtime: Any = Began()
    state = StepState(runtime, 2, max_rows=8, configured=configured, first_is_was=True)
    state.computes[0, "op"] = lambda x: x
    return runtime, Gpu(monkeypatch, runtime), state


def test_a_captured_step_keeps_the_mode_that_was_predicted_or_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    for configured, expected in (
        (None, [Mode.CAS, Mode.WAS, Mode.WAS]),
        (Mode.CAS, [Mode.CAS, Mode.CAS, Mode.WAS]),
        (Mode.WAS, [Mode.WAS] * 3),
    ):
        runtime, gpu, state = whole_graphs(monkeypatch, configured)
        for rows in (4, 8, 16):
            gpu.capture(state, rows)
        captured = [(StepKind.CAPTURE, rows, mode) for rows, mode in zip((4, 8, 16), expected, strict=True)]
        assert runtime.calls == [call for step in captured for call in (step, "end")], "of the warm-up, and whole"
        state.warming_up = False
        runtime.calls.clear()
        for rows in (16, 4):
            state.graph_next((rows, "uniform"))
            state.graph_launched()
            assert runtime.calls[1] == (StepKind.REPLAY, rows, dict(zip((4, 8, 16), expected, strict=True))[rows])
            runtime.calls.clear()


def test_a_graph_is_launched_within_a_step_and_its_first_launch_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, gpu, state = whole_graphs(monkeypatch)
    gpu.capture(state, 4)
    state.warming_up = False
    begun = (StepKind.REPLAY, 4, Mode.CAS)
    for expected in (["wait", begun, "check", "launched", "wait", "end"], [begun, "check", "launched", "end"]):
        runtime.calls.clear()
        state.graph_next((4, "uniform"))
        state.graph_launched()
        state.graph_launched()  # vLLM may ask for logits twice
        assert runtime.calls == expected
    runtime.calls.clear()
    state.graph_next((4, "uniform"))  # nobody asks for its logits
    state.begin(9)
    state.end()
    assert runtime.calls == [begun, "check", "launched", "end", (StepKind.RUN, 9, None), "end"]


def test_a_call_that_raised_does_not_hide_the_next_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, gpu, state = whole_graphs(monkeypatch)
    gpu.capture(state, 4)
    state.warming_up = False
    runtime.calls.clear()
    state.begin(9)
    state.graph_next((4, "uniform"))
    assert runtime.calls[1] == "broken off"
    assert (StepKind.REPLAY, 4, Mode.CAS) in runtime.calls


def test_graphs_that_vllm_dropped_are_captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, gpu, state = whole_graphs(monkeypatch)
    gpu.capture(state, 4)
    gpu.capture(state, 4, "of one request each")  # another graph
    with pytest.raises(ConfigError, match="2 full CUDA graphs keep the mode"):
        state.pin(Mode.WAS)
    with pytest.raises(UnsupportedError, match="of 4 tokens a second time"):
        gpu.capture(state, 4)
    gpu.capturing = False
    state.graph_launched()
    state.forget_graphs()
    state.pin(Mode.WAS)
    gpu.capture(state, 4)
    assert runtime.calls[-2:] == [(StepKind.CAPTURE, 4, Mode.WAS), "end"]
