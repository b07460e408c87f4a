"""The modes of a vLLM engine's steps: what is WaS whatever the policy would choose."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sidp_runtime import Mode
from sidp_runtime.integrations.vllm.step import StepState


class Began:
    """A runtime that only notes in which mode a step begins, and whether it counts."""

    def __init__(self) -> None:
        self.modes: list[Any] = []
        self.counted: list[bool] = []
        self.pool = self._core = self

    def is_local(self, layer: int) -> bool:
        return False

    def _stream(self, stream: object) -> int:
        return 0

    def begin_step(self, num_tokens: int, stream: int, kind: Any, mode: Any) -> Any:
        self.modes.append(mode)
        return SimpleNamespace(mode=mode)

    def end_step(self, broken_off: bool = False) -> None:
        self.counted.append(not broken_off)


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
