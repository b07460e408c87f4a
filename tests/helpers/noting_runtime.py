"""A runtime that only notes what is called, and torch's stream beside it: for steps of a vLLM engine without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sidp_runtime import Mode


class Began:
    """A runtime that only notes what is called: in which mode a step begins, and whether it counts."""

    def __init__(self) -> None:
        self.modes: list[Any] = []
        self.counted: list[bool] = []
        self.calls: list[Any] = []
        self.pool = self._core = self
        self._device, self.closed = None, False

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


class Gpu:
    """torch's current stream: whether it is captured; that it was waited for is one of the runtime's calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, runtime: Began) -> None:
        self.capturing = False
        stream = SimpleNamespace(synchronize=lambda: runtime.calls.append("wait"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
