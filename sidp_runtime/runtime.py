"""Runtime: steps over a weight pool."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from . import _C, _torch
from ._C import Mode, StepKind
from .errors import ClosedError, ConfigError, SidpError, SlowCopyWarning, UnhelpfulWarning, UnknownNameError
from .manifest import DTYPE_BYTES
from .ops import Op, OpProgram, buckets_of
from .policy import ModePolicy, advice
from .tracing import NUM_EVENTS, Tracing
from .weight_pool import WeightPool

if TYPE_CHECKING:
    import torch

_still_used: list[Any] = []  # graphs of runtimes that closed with a stream at work: their memory may still be written


class Replayable(Protocol):
    """What a ``torch.cuda.CUDAGraph`` is here."""

    def replay(self) -> Any: ...


class Step:
    """One forward pass, a context manager; ``mode`` is fixed and ``reason`` says why it was chosen."""

    def __init__(
        self, runtime: Runtime, num_tokens: int, stream: int, kind: StepKind = StepKind.RUN, mode: Mode | None = None
    ) -> None:
        self._runtime = runtime
        self._num_tokens = num_tokens
        self._stream = stream
        self._kind = kind
        self._mode = mode
        self._decision: _C.Decision | None = None

    def replay(self, graph: Replayable) -> None:
        """Launches, once, a graph that was captured in ``mode``; for steps of ``replay_step`` only."""
        core = self._runtime._core
        core.check_launch()
        with _torch.on_stream(self._stream, self._runtime._device):
            graph.replay()
        core.launched()  # before anything can wait for the graph: its own waits need the copies that this queues

    @property
    def mode(self) -> Mode:
        return self._begun().mode

    @property
    def reason(self) -> str:
        return self._begun().reason

    @property
    def explanation(self) -> str:
        """The reason in words, with the figures that were compared."""
        return self._begun().explanation

    def _begun(self) -> _C.Decision:
        if self._decision is None:
            raise ConfigError("a step has a mode once it has begun: with runtime.step(...) as step")
        return self._decision

    def __enter__(self) -> Step:
        self._decision = self._runtime._core.begin_step(self._num_tokens, self._stream, self._kind, self._mode)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._runtime.closed:
            return  # the body's error says more than a refusal to end the step
        self._runtime._core.end_step(kind is not None)


class Runtime:
    """Uses a published pool, one thread at a time. Constructing is collective; steps never wait for a peer's step.

    ``policy``: None, on all ranks or on none: measured if need be (``ModePolicy.calibrated_in_turns``). ``ops``: what
    ``remote_compute`` can ask for, the same on all ranks, a layer's in order of use; none: WaS only. ``max_rows``: rows
    of the largest request. ``deadline_ms``: bound of every wait in a step, by default the group's. What one rank
    refuses, a warning made an error too, ends the others' set-up at once.

    On the host the stream is the calling thread, and ``stream`` takes only ``None``. On a GPU calls only enqueue:
    ``stream`` is a ``torch.cuda.Stream``, a handle, or ``None`` for torch's current one; a step runs on one stream and
    follows the step before it whatever stream that ran on. What goes wrong on a stream ``check`` tells. Steps can be
    captured in CUDA graphs (``capture_step``). ``row_buckets``: the row counts that owners compute, ascending; a
    request is rounded up to the next one, and ``max_rows`` defaults to the largest. By default those of
    ``ops.spread_rows``. Ops are captured for each of them here. ``owners_engines``: layers are written here by the copy
    engines of their owners' GPUs, for which this process needs a context on each (276 MiB of an H200's memory, 1480
    with kernels loaded early); otherwise this GPU's reads them, which takes more of a link. Where a peer's engine
    cannot be had, a ``SlowCopyWarning`` says why. ``exclusive_links``, the same on all ranks: on GPUs, in groups of
    three or more, an owner's link serves one reader at a time (csrc/DESIGN.md), as policy and planner expect.
    """

    def __init__(
        self,
        pool: WeightPool,
        *,
        policy: ModePolicy | None = None,
        ops: Sequence[Op] = (),
        max_rows: int = 0,
        row_buckets: Sequence[int] | None = None,
        deadline_ms: int | None = None,
        owners_engines: bool = True,
        exclusive_links: bool = True,
        test_lane_delay_us: int = 0,
        test_service_delay_us: int = 0,
    ) -> None:
        self.pool = pool
        self._device = pool.group.device
        self._stream: Callable[[object], int] = _no_stream  # reads what callers pass as `stream`
        if self._device is not None:
            from . import _torch_gpu

            self._stream = _torch_gpu.stream_reader(self._device)
        self.policy = policy or ModePolicy.calibrated_in_turns(pool)
        if self._device is None and row_buckets is not None:
            raise ConfigError("the host backend computes every row count; row_buckets are for GPUs")
        buckets = buckets_of(max_rows, row_buckets) if self._device is not None and ops else []
        max_rows = buckets[-1] if buckets else max_rows
        self._ops = {op.name: index for index, op in enumerate(ops)}
        if len(self._ops) != len(ops):
            raise ConfigError(f"two ops have one name: {', '.join(op.name for op in ops)}")
        self._op_list = tuple(ops)
        self._programs: dict[tuple[int, int], OpProgram] = {}
        self._kernels: list[list[_C.OpKernel | None]] = []
        core_ops = [self._core_op(index, op) for index, op in enumerate(ops)]
        programs = [next(p for (i, _), p in self._programs.items() if i == index) for index in range(len(ops))]
        self._final_stats: dict[str, Any] = {}
        self._open_core: _C.Runtime | None = _C.Runtime(
            pool.core,
            core_ops,
            deadline_ms=pool.group.deadline_ms if deadline_ms is None else deadline_ms,
            max_rows=max_rows,
            row_bytes=sum(
                op.in_features * DTYPE_BYTES[op.dtype] + program.out_row_bytes
                for op, program in zip(ops, programs, strict=True)
            ),
            element_bytes=DTYPE_BYTES[max(pool.layers[0].tensors, key=lambda t: t.num_bytes).dtype],
            profile=self.policy.profile.core,
            fixed=self.policy.fixed_mode,
            fixed_sizes=self.policy.fixed_sizes,
            hysteresis=self.policy.hysteresis,
            row_buckets=buckets,
            deferred_start=True,
            # a kernel that waits would use up the time slices that its owner needs on the same GPU
            spin_rows=0 if pool.group.gpu_is_shared else _C.SPIN_ROWS,
            owners_engines=owners_engines,
            exclusive_links=exclusive_links,
            test_lane_delay_us=test_lane_delay_us,
            test_service_delay_us=test_service_delay_us,
        )
        # Addresses are fixed for the life of the pool, so the views are made once.
        self._views = {
            i: pool.layer_view(i) if pool.is_local(i) else pool.ring_view(i) for i in range(len(pool.layers))
        }
        self._lent: dict[tuple[int, int, int], list[torch.Tensor] | None] = {}  # by layer, op and rows
        self.handle = _torch.register_runtime(self)
        pool._runtime = weakref.ref(self)
        self._graphs: list[Any] = []  # own the memory that the captured ops use
        try:
            try:
                if pool.placement.streamed_layers(pool.group.rank):
                    for words in advice(self._core, self.policy, max_rows, pool.held_bytes, pool.pooled_bytes):
                        warnings.warn(words, UnhelpfulWarning, stacklevel=2)
                if why := self._core.stats()["why_read"]:
                    warnings.warn(
                        f"layers are read by this GPU's copy engine, not written by their owner's: {why}",
                        SlowCopyWarning,
                        stacklevel=2,
                    )
                if buckets:
                    from . import _torch_gpu

                    self._graphs = _torch_gpu.capture_ops(
                        pool, self._core, list(zip(ops, self._kernels, strict=True)), buckets
                    )
            except Exception as error:
                with contextlib.suppress(SidpError):  # the others need not wait for this rank
                    self._core.start(failure=str(error))
                raise
            self._core.start()
        except BaseException:
            self.close()
            raise

    def _core_op(self, index: int, op: Op) -> _C.Op:
        captured: dict[tuple[Any, ...], OpProgram] = {}
        kernels: list[_C.OpKernel | None] = [None] * len(self.pool.layers)
        for layer in op.weights:
            specs = op.specs(self.pool.layers, layer)
            key = op.layout(self.pool.layers, layer)
            if key not in captured:
                captured[key] = _torch.program_of(op, specs, self._device)
            program = self._programs[index, layer] = captured[key]
            kernels[layer] = (
                _torch.make_kernel(op, program, self.pool.layers[layer], specs)
                if self._device is None
                else _C.graph_op(self.pool.backend)
            )
        self._kernels.append(kernels)
        if len({(p.output_columns, p.output_dtypes) for p in captured.values()}) != 1:
            raise ConfigError(f"op {op.name!r} gives other columns or dtypes in some layers; make it two ops")
        return _C.Op(
            name=op.name,
            description=" ".join([op.kernel, *sorted(map(repr, captured.values()))]),
            in_row_bytes=op.in_features * DTYPE_BYTES[op.dtype],
            out_row_bytes=next(iter(captured.values())).out_row_bytes,
            kernels=kernels,
        )

    def step(self, num_tokens: int, *, stream: object = None) -> Step:
        """A forward pass of ``num_tokens`` rows; the mode is chosen when it is entered. Steps do not nest.

        If the body raises, layers that it did not use are skipped and the next step finds everything in order.
        Entering raises what ``check`` raises.
        """
        return Step(self, num_tokens, self._stream(stream))

    def capture_step(self, num_tokens: int, mode: Mode, *, stream: object = None) -> Step:
        """A step whose calls go into the CUDA graph that is being captured on the stream. Nothing runs or is counted.

        Copies stay outside the graph: it only waits for slots and empties them. ``UsageError`` at the end if the body
        did not use every streamed layer. ``UnsupportedError`` on the host.
        """
        return Step(self, num_tokens, self._stream(stream), StepKind.CAPTURE, mode)

    def replay_step(self, num_tokens: int, *, stream: object = None) -> Step:
        """A step whose body launches, once, the graph that was captured in ``step.mode``, and calls nothing else here.

        ``with runtime.replay_step(n) as step: step.replay(graphs[step.mode])``
        """
        return Step(self, num_tokens, self._stream(stream), StepKind.REPLAY)

    def predicted_modes(self, batch_sizes: Iterable[int]) -> dict[int, Mode]:
        """The mode that the policy would choose now for each size: what to capture, and a ``fixed`` for a policy."""
        return {size: self._core.preview(size).mode for size in batch_sizes}

    def begin_step(self, num_tokens: int, *, stream: object = None) -> _C.Decision:
        """Opens a step where a context manager does not fit; close it with ``end_step``."""
        return self._core.begin_step(num_tokens, self._stream(stream))

    def end_step(self, *, broken_off: bool = False) -> None:
        """Closes it. ``UsageError`` if a WaS step skipped a streamed layer and did not break off."""
        self._core.end_step(broken_off)

    def check(self) -> None:
        """Raises if a request of a step on a GPU was not answered: call it once the stream is synchronised, before use.

        ``DeadlineError`` or ``RemoteOpError``; what the steps computed since is void, and so is the runtime: close it.
        At an owner, ``RemoteOpError`` if it could not launch an op that it was asked for. Nothing to find on the host,
        where calls raise themselves.
        """
        self._core.check()

    def fetch_layer(self, layer: int, *, stream: object = None) -> dict[str, torch.Tensor]:
        """The layer's tensors by name, valid until ``release_layer``; the same objects each step.

        Streamed layers: in a WaS step only, each once, in the order of the pool. Raises ``UsageError`` out of order or
        when the slot is still held, ``DeadlineError`` if the copy does not come, ``UnknownNameError``.
        """
        (self._open_core or self._core).fetch_layer(layer, self._stream(stream))
        return self._views[layer]

    def release_layer(self, layer: int, *, stream: object = None) -> None:
        """After the last use of the tensors."""
        (self._open_core or self._core).release_layer(layer, self._stream(stream))

    def views(self, layer: int) -> dict[str, torch.Tensor]:
        """What ``fetch_layer`` will return, without waiting: addresses are fixed, contents are not."""
        if layer not in self._views:
            self._core  # noqa: B018 - closed comes before unknown
            raise UnknownNameError(f"layer {layer} is not one of the pool's {len(self.pool.layers)}", layer=layer)
        return self._views[layer]

    def op_program(self, op: str, layer: int) -> OpProgram:
        """The captured program of an op for a layer; ``UnknownNameError`` if there is none."""
        index = self._op_index(op)
        if (index, layer) not in self._programs:
            raise UnknownNameError(f"layer {layer} has no op {op!r}", layer=layer)
        return self._programs[index, layer]

    def remote_compute(
        self, layer: int, op: str, x: torch.Tensor, *, borrow: bool = False, stream: object = None
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """``op(layer, x)`` computed by the layer's owner; ``x`` is ``[rows, in_features]`` with 1 .. ``max_rows`` rows.

        Streamed layers in a CaS step only. On the host row counts are kept, so the result is bit-equal to computing
        here with the same number of threads; on a GPU the owner computes the next of ``row_buckets``, and the result is
        that of as many rows. If the owner is dead or silent past the deadline, the op runs here on the owner's
        bytes (``stats()["fallbacks"]``), and that owner is not asked again. Raises ``ShapeError``,
        ``UnknownNameError``, ``UsageError``, ``RemoteOpError``.

        ``borrow``: an answer of up to 128 rows on a GPU that no other rank shares stays where its owner put it, which
        saves its copy. The result is then valid on that stream until the next ``remote_compute`` to the same owner is
        enqueued there, whose ``x`` it may be: that answer overwrites it. Other answers are copied all the same.
        """
        handle = self._stream(stream)
        program = self.op_program(op, layer)
        index = self._op_index(op)
        with _torch.on_stream(handle, self._device):  # torch gives and takes memory by its current stream
            rows = _torch.request_rows(self._op_list[index], x, self._device)
            count = rows.shape[0]
            bucket = self._core.bucket(layer, count)
            outputs = self._borrowed(layer, index, count, bucket) if borrow else None
            room_at = 0
            if outputs is None:
                room, outputs = _torch.reply_rows(program, count, bucket, rows.device)
                room_at = room.data_ptr()
            self._core.remote_compute(
                layer,
                index,
                (rows.data_ptr(), count, rows.shape[1] * rows.element_size()),
                (room_at, bucket, program.out_row_bytes),
                handle,
            )
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _borrowed(self, layer: int, index: int, count: int, bucket: int) -> list[torch.Tensor] | None:
        """The outputs of a request where its owner puts them, made once; None if they are always copied."""
        key = layer, index, count
        if key not in self._lent:
            program = self._programs[index, layer]
            slot = self._core.lent(layer, count, bucket * program.out_row_bytes)
            self._lent[key] = None if slot is None else _torch.lent_views(program, count, bucket, slot)
        return self._lent[key]

    def stats(self) -> dict[str, Any]:
        """Counters since the start: steps and tokens by mode, bytes by peer, waits, hits, requests, fallbacks.

        ``owners_engines``: by peer, whether its GPU's copy engine writes here; ``why_read``: why not, where it should.
        ``link_wait_ns``: how long copies waited for ``exclusive_links``; ``links_taken``: from dead or stopped ranks.
        Of the policy: ``decisions`` by reason, ``last_decision`` in words, ``mode_changes``, and ``step_times`` by mode
        and size: medians of recent steps, predicted and measured, and the correction; on a GPU late by some steps.

        For the thread of the steps. Another one finds counters of different moments, or half written, while a step
        runs; those of copies and served requests are whole.
        """
        return self._final_stats if self._open_core is None else self._open_core.stats()

    def tracing(self, path: Path | str | None = None, *, num_events: int = NUM_EVENTS, nvtx: bool = False) -> Tracing:
        """``with runtime.tracing("trace.json"):`` traces the steps of its body for ui.perfetto.dev (docs/trace.md).

        Memory for ``num_events`` is taken on entering; when it is full the newest are dropped, and the trace says how
        many. A step that is open at the end is cut there. ``nvtx``: also NVTX ranges, for nsys. ``UsageError`` inside a
        step or another trace, ``DeadlineError`` if the last step does not end, ``UnsupportedError`` for ``nvtx`` where
        torch has none.
        """
        return Tracing(self, path, num_events, nvtx)

    def close(self) -> None:
        """Stops lane and service and leaves the group; peers go on with this rank's bytes. Idempotent.

        ``stats`` keeps its last counters; tensors that were handed out stay valid memory.
        """
        if self._open_core is not None:
            if not self._open_core.close():
                _still_used.append(self._graphs)
            self._final_stats = self._open_core.stats()
            self._open_core = None
            self._views, self._lent = {}, {}

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        return self._open_core is None

    @property
    def _core(self) -> _C.Runtime:
        if self._open_core is None:
            raise ClosedError("the runtime is closed", rank=self.pool.group.rank)
        return self._open_core

    def _op_index(self, op: str) -> int:
        if op not in self._ops:
            raise UnknownNameError(f"op {op!r} was not declared; the ops are: {', '.join(self._ops) or 'none'}")
        return self._ops[op]


def _no_stream(stream: object) -> int:
    if stream is not None:
        raise ConfigError("the host backend has no streams: the calling thread is the stream; pass None")
    return 0
