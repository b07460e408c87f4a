"""A trace of one runtime, and NVTX ranges around its calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from .. import _C
from ..errors import ConfigError
from . import chrome

if TYPE_CHECKING:
    from ..runtime import Runtime

NUM_EVENTS = 1 << 15  # 56 bytes each, and on a GPU two CUDA events


class Tracing:
    """What ``Runtime.tracing`` returns: traces from enter, between steps, to exit, then writes the file.

    A step that is open at exit goes on, and the trace has its first part, marked as broken off.
    ``part``: this rank's share, for ``tracing.write`` of several ranks in one file; there once it has ended.
    """

    def __init__(self, runtime: Runtime, path: Path | str | None, num_events: int, nvtx: bool) -> None:
        if num_events < 1:
            raise ConfigError(f"num_events is {num_events}, must be at least 1")
        self._runtime = runtime
        self._path = path
        self._num_events = num_events
        self._nvtx = nvtx
        self._core: _C.Runtime | None = None
        self.part: chrome.Part = {}

    def __enter__(self) -> Tracing:
        core = self._runtime._core
        ranged: Any = None
        if self._nvtx:
            from .. import _torch_gpu

            ranged = WithRanges(core, list(self._runtime._ops), *_torch_gpu.nvtx_calls())
        core.start_trace(self._num_events)
        self._core = core
        if ranged is not None:
            self._runtime._open_core = cast(_C.Runtime, ranged)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._core is not None
        if not self._runtime.closed:
            if isinstance(ranged := cast(object, self._runtime._open_core), WithRanges):
                ranged.leave_step()
            self._runtime._open_core = self._core
        ended = self._core.stop_trace()
        self.part = chrome.part_of(ended, self._runtime.pool.group.rank, list(self._runtime._ops))
        if self._path is not None:
            chrome.write(self._path, [self.part])


class WithRanges:
    """A runtime's core whose calls lie in NVTX ranges; ``push(name)`` and ``pop()`` are torch's."""

    def __init__(
        self, core: _C.Runtime, op_names: Sequence[str], push: Callable[[str], object], pop: Callable[[], object]
    ) -> None:
        self._core = core
        self._op_names = op_names
        self._push = push
        self._pop = pop
        self._in_step = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def begin_step(self, num_tokens: int, *arguments: Any) -> _C.Decision:
        decision = self._core.begin_step(num_tokens, *arguments)
        self._push(f"step {'was' if decision.mode == _C.Mode.WAS else 'cas'}, {num_tokens} tokens")
        self._in_step = True
        return decision

    def end_step(self, broken_off: bool) -> None:
        try:
            self._core.end_step(broken_off)
        finally:
            self.leave_step()

    def leave_step(self) -> None:
        """Closes the range of the step if one is open."""
        if self._in_step:
            self._in_step = False
            self._pop()

    def fetch_layer(self, layer: int, stream: int = 0) -> None:
        with self._range(f"fetch layer {layer}"):
            self._core.fetch_layer(layer, stream)

    def release_layer(self, layer: int, stream: int = 0) -> None:
        with self._range(f"release layer {layer}"):
            self._core.release_layer(layer, stream)

    def remote_compute(self, layer: int, op: int, x: Any, y: Any, stream: int = 0) -> None:
        with self._range(f"remote_compute layer {layer} {self._op_names[op]}"):
            self._core.remote_compute(layer, op, x, y, stream)

    @contextlib.contextmanager
    def _range(self, name: str) -> Any:
        self._push(name)
        try:
            yield
        finally:
            self._pop()
