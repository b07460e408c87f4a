"""The step that vLLM's model is in, and the operators that its graphs call.

The operators are the same in every layer on every rank, and what they do is decided when they run: engines that share a
cache of compiled graphs own different layers, and a step's mode is chosen when it begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ... import Mode, Runtime
from ..._C import StepKind
from ...errors import UsageError
from ...runtime import Step
from . import compat

Compute = Callable[[torch.Tensor], torch.Tensor]

#: Names by which vLLM splits its graphs.
OPERATORS = ("sidp::vllm_fetch", "sidp::vllm_release", "sidp::vllm_compute")


class StepState:
    """An engine's steps. One thread at a time, vLLM's worker."""

    def __init__(self, runtime: Runtime, num_layers: int, max_rows: int) -> None:
        self.runtime = runtime
        self.pinned: Mode | None = None  # see pin
        self.computes: dict[tuple[int, str], Compute] = {}  # what a layer's op is without the pool
        self._local = [runtime.pool.is_local(layer) for layer in range(num_layers)]
        self._max_rows = max_rows
        self._step: Step | None = None
        self._is_replay = False
        self._captured: dict[int, Mode] = {}  # by rows of a full CUDA graph
        self._is_cas = False

    def pin(self, mode: Mode | None) -> None:
        """From the next step on this mode where a step's rows allow it, or again the policy's choice (None)."""
        self.pinned = mode

    # --- Steps --------------------------------------------------------------------------------------------------------

    def begin(self, rows: int) -> None:
        """Before vLLM calls the model, or captures it in a full CUDA graph."""
        self._end_open()
        if self._capturing():
            mode = self._captured.setdefault(rows, self._mode_to_capture(rows))
            step = Step(self.runtime, rows, self.runtime._stream(None), StepKind.CAPTURE, mode)
        else:
            step = Step(self.runtime, rows, self.runtime._stream(None), StepKind.RUN, self._pinned_for(rows))
        self._enter(step)

    def end(self) -> None:
        """After it."""
        self._close(broken_off=False)

    def _end_open(self) -> None:
        """Ends what has no end of its own: a replayed graph, and a call of the model that raised."""
        if self._step is not None:
            self._close(broken_off=not self._is_replay)

    def _close(self, *, broken_off: bool) -> None:
        step, self._step = self._step, None
        if step is not None and not self.runtime.closed:
            self.runtime.end_step(broken_off=broken_off)

    def before_graph(self) -> None:
        """vLLM is about to capture or replay a CUDA graph. A full one is a whole step; its model is not called."""
        rows = compat.replayed_tokens()
        if rows is None or rows not in self._captured:
            return  # piecewise, or about to be captured
        self._end_open()
        self._enter(Step(self.runtime, rows, self.runtime._stream(None), StepKind.REPLAY, self._captured[rows]))
        self._is_replay = True
        # vLLM launches the graph next and calls nobody afterwards: the copies that it waits for are queued now, and the
        # step ends when the next one begins.
        self.runtime._core.launched()

    def _enter(self, step: Step) -> None:
        step.__enter__()
        self._step, self._is_replay = step, False
        self._is_cas = step.mode == Mode.CAS

    def _capturing(self) -> bool:
        return self.runtime.pool.group.device is not None and torch.cuda.is_current_stream_capturing()

    def _pinned_for(self, rows: int) -> Mode | None:
        if self.pinned == Mode.CAS and (rows > self._max_rows or not self.computes):
            return Mode.WAS
        return self.pinned

    def _mode_to_capture(self, rows: int) -> Mode:
        mode = self._pinned_for(rows) or self.runtime.policy.fixed
        if mode is None or (mode == Mode.CAS and rows > self._max_rows):
            # What a graph does is fixed for good; WaS is right for any peer, alive or not.
            return Mode.WAS
        return mode

    def stats(self) -> dict[str, Any]:
        """The runtime's counters, a replayed step included."""
        if self._is_replay:
            self._end_open()
        return self.runtime.stats()

    # --- Layers -------------------------------------------------------------------------------------------------------

    def fetch(self, layer: int) -> None:
        if not self._is_cas and not self._local[layer]:
            self.runtime.fetch_layer(layer)

    def release(self, layer: int) -> None:
        if not self._is_cas and not self._local[layer]:
            self.runtime.release_layer(layer)

    def compute(self, layer: int, op: str, x: torch.Tensor) -> torch.Tensor:
        if not self._is_cas or self._local[layer]:
            return self.computes[layer, op](x)
        result = self.runtime.remote_compute(layer, op, x)
        assert isinstance(result, torch.Tensor)
        return result


_state: StepState | None = None


def set_state(state: StepState | None) -> None:
    """Makes it this process's engine: its graphs name layers, not runtimes, because they are kept on disk."""
    global _state
    _state = state


def state() -> StepState:
    """This process's engine; ``UsageError`` if it has none."""
    if _state is None:
        raise UsageError("this process has no vLLM engine with load_format='sidp', or it was closed")
    return _state


def _fetch(x: torch.Tensor, layer: int) -> None:
    state().fetch(layer)


def _release(y: torch.Tensor, layer: int) -> None:
    state().release(layer)


def _compute(x: torch.Tensor, layer: int, op: str, out_features: int) -> torch.Tensor:
    return state().compute(layer, op, x)


def _compute_fake(x: torch.Tensor, layer: int, op: str, out_features: int) -> torch.Tensor:
    return x.new_empty((x.shape[0], out_features))


# Not torch.library.custom_op: its dispatch costs tens of microseconds, several times a layer.
_library: Any = torch.library.Library("sidp", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("vllm_fetch(Tensor(a!) x, int layer) -> ()")
_library.define("vllm_release(Tensor(a!) y, int layer) -> ()")
_library.define("vllm_compute(Tensor x, int layer, str op, int out_features) -> Tensor")
_library.impl("vllm_fetch", _fetch, "CompositeExplicitAutograd")
_library.impl("vllm_release", _release, "CompositeExplicitAutograd")
_library.impl("vllm_compute", _compute, "CompositeExplicitAutograd")
_library._register_fake("vllm_fetch", lambda x, layer: None)
_library._register_fake("vllm_release", lambda y, layer: None)
_library._register_fake("vllm_compute", _compute_fake)
