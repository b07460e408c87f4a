"""The step that vLLM's model is in, and the operators that its graphs call.

The operators are the same on every rank, and what they do is decided when they run: engines that share a cache of
compiled graphs own different layers, and a step's mode is chosen when it begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from ... import Mode, Runtime
from ..._C import StepKind
from ...errors import ConfigError, UnsupportedError, UsageError
from ...runtime import Step


class Compute(Protocol):
    """Of ``[rows, in_features]`` the result, ``[rows, out_features]``, in ``out`` if given."""

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor: ...


#: Names by which vLLM splits its graphs.
OPERATORS = ("sidp::vllm_fetch", "sidp::vllm_release", "sidp::vllm_compute")


class StepState:
    """An engine's steps. One thread at a time, vLLM's worker.

    ``warming_up``: at first calls of the model are no steps, but for captures: they compile, or measure memory, so no
    layer is copied for them, and their numbers mean nothing. ``first_is_was``: on a GPU each size's first step after
    that is WaS, and begins when no step before it waits for answers. What an engine does then for the first time (a
    kernel loaded, memory page-locked) may wait for the device, as two engines that ask each other for answers must not.

    A step that vLLM captures as one CUDA graph keeps its mode: the configured one, or what the policy predicts. vLLM
    launches it without a call of the model; ``launch`` stands around that. Around a graph's first launch the host waits
    for the stream, for the same reason.
    """

    def __init__(
        self,
        runtime: Runtime,
        num_layers: int,
        max_rows: int,
        configured: Mode | None = None,
        first_is_was: bool = False,
    ) -> None:
        self.runtime = runtime
        self._configured = configured
        self.pinned = configured  # see pin
        self.warming_up = True
        self.computes: dict[tuple[int, str], Compute] = {}  # what a layer's op is without the pool
        self.methods: list[tuple[Any, Any]] = []  # linears in whose place an operator stands, with their own method
        self._local = [runtime.pool.is_local(layer) for layer in range(num_layers)]
        self._max_rows = max_rows
        self._in_step = False
        self._is_cas = False
        self._on_gpu = first_is_was
        self._tried: set[int] = set()
        self._may_wait = True  # steps under way, for answers
        self._graphs: dict[object, Mode] = {}  # of whole steps, by what vLLM tells them apart by
        self._launched: set[object] = set()
        self._capturing: object = None

    def pin(self, mode: Mode | None) -> None:
        """From the next step on this mode where a step may have it, or again as configured (None).

        ``ConfigError`` where steps are captured as a whole, as their mode is.
        """
        if mode is not None and self._graphs:
            raise ConfigError(
                f"{len(self._graphs)} full CUDA graphs keep the mode they were captured in: give the engine "
                "cudagraph_mode 'PIECEWISE' or 'NONE', or another mode when it starts"
            )
        self.pinned = self._configured if mode is None else mode

    @contextlib.contextmanager
    def own_methods(self) -> Iterator[None]:
        """Meanwhile linears have their own methods, for those who tell linears apart by them."""
        operators = [linear.quant_method for linear, _ in self.methods]
        for linear, method in self.methods:
            linear.quant_method = method
        try:
            yield
        finally:
            for (linear, _), operator in zip(self.methods, operators, strict=True):
                linear.quant_method = operator

    def is_resident(self, layer: int) -> bool:
        """Whether every engine has the layer."""
        return self.runtime.pool.placement.is_resident(layer)

    # --- Steps --------------------------------------------------------------------------------------------------------

    def begin(self, rows: int, graph: object = None) -> None:
        """Before vLLM calls the model. ``graph``: that of the whole step, where one is captured."""
        self._break_off()
        if self._on_gpu and torch.cuda.is_current_stream_capturing():
            self._begin_capture(rows, graph)
            return
        if self.warming_up:
            self._is_cas = False
            return
        mode = self.pinned
        first = self._on_gpu and rows not in self._tried
        if first and mode != Mode.WAS and self._may_wait:
            self._wait()  # vLLM runs ahead: of steps that wait for answers
        if (first and rows <= self._max_rows) or (mode == Mode.CAS and rows > self._max_rows):
            mode = Mode.WAS
        self._tried.add(rows)
        step = Step(self.runtime, rows, self.runtime._stream(None), StepKind.RUN, mode).__enter__()
        self._in_step, self._is_cas = True, step.mode == Mode.CAS
        self._may_wait |= self._is_cas

    def _wait(self) -> None:
        torch.cuda.current_stream().synchronize()
        self._may_wait = False

    def _break_off(self) -> None:
        if self._in_step:  # that call of the model raised
            self._in_step, self._capturing = False, None
            self.runtime.end_step(broken_off=True)

    def end(self) -> None:
        """After it."""
        if not self._in_step:
            return
        self._in_step = False
        graph, self._capturing = self._capturing, None
        self.runtime.end_step(broken_off=False)
        if graph is not None:
            self._graphs[graph] = Mode.CAS if self._is_cas else Mode.WAS
            self._launched.discard(graph)  # vLLM may have dropped an earlier one

    # --- Steps in one CUDA graph --------------------------------------------------------------------------------------

    def _begin_capture(self, rows: int, graph: object) -> None:
        if graph is None:
            raise UnsupportedError(
                f"vLLM captures a step of {rows} tokens, and not as one of its full CUDA graphs: launches would not be "
                "seen; give compilation_config={'cudagraph_mode': 'PIECEWISE'} without VLLM_USE_BREAKABLE_CUDAGRAPH"
            )
        mode = self.pinned if self.pinned is not None else self.runtime.predicted_modes([rows])[rows]
        if rows > self._max_rows or not self.computes:
            mode = Mode.WAS
        Step(self.runtime, rows, self.runtime._stream(None), StepKind.CAPTURE, mode).__enter__()
        self._in_step, self._is_cas, self._capturing = True, mode == Mode.CAS, graph

    def launch(self, graph: object, rows: int, call: Callable[[], Any]) -> Any:
        """Launches the graph of a whole step, by ``call``, as a step; returns what that returns."""
        self._break_off()
        if graph not in self._graphs:
            raise UsageError(f"vLLM launches a CUDA graph of {rows} tokens that was captured outside of a step")
        first = graph not in self._launched
        if first:  # it takes memory, which may wait for the steps before
            self._wait()
        self._may_wait |= self._graphs[graph] == Mode.CAS
        launch = _Launch(call)
        with Step(self.runtime, rows, self.runtime._stream(None), StepKind.REPLAY, self._graphs[graph]) as step:
            step.replay(launch)
        if first:
            self._launched.add(graph)
            self._wait()
        return launch.output

    # --- Layers -------------------------------------------------------------------------------------------------------

    # Streamed layers of WaS steps, and local ones of CaS steps: there it takes turns with what peers ask of its GPU.
    def fetch(self, layer: int) -> None:
        if self._in_step and self._is_cas == self._local[layer]:
            self.runtime.fetch_layer(layer)

    def release(self, layer: int) -> None:
        if self._in_step and self._is_cas == self._local[layer]:
            self.runtime.release_layer(layer)

    def compute(self, layer: int, op: str, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Of ``[rows, in_features]``: ``[rows, out_features]``, in ``out`` if given."""
        if not self._is_cas or self._local[layer]:
            return self.computes[layer, op](x, out)
        result = self.runtime.remote_compute(layer, op, x, borrow=out is not None)
        assert isinstance(result, torch.Tensor)
        return result if out is None else out.copy_(result)


class _Launch:
    """What ``Step.replay`` replays, and what it returned."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self.output: Any = None

    def replay(self) -> None:
        self.output = self._call()


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


def _compute(x: torch.Tensor, out: torch.Tensor, layer: int, op: str) -> None:
    state().compute(layer, op, x, out)


def compute(x: torch.Tensor, layer: int, op: str, out_features: int) -> torch.Tensor:
    """``op`` of ``layer`` of ``[rows, in_features]``: ``[rows, out_features]`` of the same dtype.

    In a graph the result is allocated before the operator, by the piece that ends at it: pieces that are captured read
    and write the same addresses in every step, and the operator runs between them.
    """
    if not torch.compiler.is_compiling():
        return state().compute(layer, op, x)
    out = torch.empty((x.shape[0], out_features), dtype=x.dtype, device=x.device)
    torch.ops.sidp.vllm_compute(x, out, layer, op)
    return out


# Not torch.library.custom_op: its dispatch costs tens of microseconds, several times a layer.
_library: Any = torch.library.Library("sidp", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("vllm_fetch(Tensor(a!) x, int layer) -> ()")
_library.define("vllm_release(Tensor(a!) y, int layer) -> ()")
_library.define("vllm_compute(Tensor x, Tensor(a!) out, int layer, str op) -> ()")
_library.impl("vllm_fetch", _fetch, "CompositeExplicitAutograd")
_library.impl("vllm_release", _release, "CompositeExplicitAutograd")
_library.impl("vllm_compute", _compute, "CompositeExplicitAutograd")
_library._register_fake("vllm_fetch", lambda x, layer: None)
_library._register_fake("vllm_release", lambda y, layer: None)
_library._register_fake("vllm_compute", lambda x, out, layer, op: None)
