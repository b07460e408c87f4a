"""torch on the GPU: devices, streams and the capture of ops as CUDA graphs."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.dlpack import from_dlpack

from . import _C, _torch
from .errors import CapacityError, ConfigError, SidpError, UnsupportedError
from .machine_profile import MachineProfile
from .manifest import DTYPE_BYTES
from .ops import Op

if TYPE_CHECKING:
    from .weight_pool import WeightPool

_LINK_BYTES = 256 << 20
HEAVY_ROWS = 256  # from here on products, not the reading of weights, take a step's time, and the GPU's power
HEAT_S = 0.5  # of such work ahead of what is timed: the clock follows the power over tenths of a second
HEAVY_SAMPLE_S = 0.25  # so a sample of such work is as long


def use_device(ordinal: int | None) -> int:
    """Makes a GPU torch's current one, by default the one that is, and gives its ordinal."""
    chosen = torch.cuda.current_device() if ordinal is None else ordinal
    if not 0 <= chosen < torch.cuda.device_count():
        raise ConfigError(f"device {chosen} is not one of the {torch.cuda.device_count()} that torch sees")
    torch.cuda.set_device(chosen)
    for priority in (0, -1):
        # torch makes all its streams at the first; later, while one is blocked on a flag, making them would hang.
        torch.cuda.Stream(chosen, priority=priority)  # type: ignore[no-untyped-call]
    return chosen


def has_started() -> bool:
    """Whether torch has started CUDA in this process."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def synchronize(device: int) -> None:
    """Waits for everything on a device."""
    torch.cuda.synchronize(device)


def free_bytes(device: int) -> int:
    """Free memory of a device, as the driver counts it."""
    return int(torch.cuda.mem_get_info(device)[0])


class Taken:
    """Seconds of set-up, and bytes that went from a GPU beside torch's allocator, part by part.

    Those of other processes there count too. On the host (``device`` None) no bytes are counted.
    """

    def __init__(self, device: int | None) -> None:
        self._device = device
        self.by_part: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._left = self._not_taken()
        self._marked = time.monotonic()

    def mark(self, part: str) -> None:
        """What went since the last mark was for ``part``."""
        before_s, self._marked = self._marked, time.monotonic()
        self.seconds[part] = self.seconds.get(part, 0.0) + self._marked - before_s
        before, self._left = self._left, self._not_taken()
        if self._device is not None:
            self.by_part[part] = self.by_part.get(part, 0) + before - self._left

    def _not_taken(self) -> int:
        return 0 if self._device is None else free_bytes(self._device) + torch.cuda.memory_reserved(self._device)


def nvtx_calls() -> tuple[Callable[[str], object], Callable[[], object]]:
    """torch's calls that open and close an NVTX range; ``UnsupportedError`` from a torch without CUDA."""
    try:
        torch.cuda.nvtx.mark("sidp")  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise UnsupportedError(f"this torch has no NVTX ({error}): trace without nvtx=True") from error
    return torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop


def stream_reader(device: int) -> Callable[[object], int]:
    """Gives the CUstream of a ``torch.cuda.Stream``, of an integer handle, or for None of torch's current stream."""
    current = _torch.current_stream

    def read(stream: object) -> int:
        if stream is None:
            return current(device)
        if isinstance(stream, int):
            return stream
        handle = getattr(stream, "cuda_stream", None)
        if not isinstance(handle, int):
            raise ConfigError(f"{stream!r} is not a CUDA stream: pass a torch.cuda.Stream, its handle, or None")
        return handle

    return read


def capture_ops(
    pool: WeightPool,
    core: _C.Runtime,
    ops: Sequence[tuple[Op, Sequence[_C.OpKernel | None]]],
    row_buckets: Sequence[int],
) -> list[torch.cuda.CUDAGraph]:
    """Captures each op for every slot that this rank may have to answer, and hands the graphs to the service.

    Those are the slots of all requesters for the layers that this rank owns, and its own slots at the other owners, to
    stand in for one that no longer answers. The graphs share one memory pool, for the service runs them one at a time;
    keep what is returned as long as the runtime.
    """
    rank, world_size, placement = pool.group.rank, pool.group.world_size, pool.placement
    captured: list[torch.cuda.CUDAGraph] = []
    with torch.cuda.device(pool.group.device), torch.no_grad():
        # cuBLAS keeps one workspace a stream. That of the service's stream is made inside the captures, so it lies in
        # their memory pool, and no stream that torch hands out shares it.
        stream = torch.cuda.ExternalStream(_C.service_stream(core))  # type: ignore[no-untyped-call]
        memory = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        run: set[tuple[Any, ...]] = set()
        for op, kernels in ops:
            for layer in op.weights:
                owner, kernel = placement.owner(layer), kernels[layer]
                if kernel is None or owner < 0:
                    continue
                view = pool.core.local_layer(layer) if owner == rank else _C.peer_layer(pool.core, layer)
                tensors = _torch.tensor_views(view, pool.layers[layer])
                weights = {short: tensors[name] for short, name in op.weights[layer].items()}
                layout = op.layout(pool.layers, layer)
                requesters = [r for r in range(world_size) if r != rank] if owner == rank else [rank]
                for requester, rows in itertools.product(requesters, row_buckets):
                    first = (op.name, rows, layout) not in run
                    graph = _capture(op, weights, core, (owner, requester, rows), stream, memory, first)
                    run.add((op.name, rows, layout))
                    _C.add_graph(kernel, owner, requester, rows, graph.raw_cuda_graph())
                    captured.append(graph)
        torch.cuda.synchronize()
    return captured


def check_outputs(op: Op, rows: int, y: Any) -> None:
    """``ConfigError`` if an op gives something else than it says: answers would be put beyond their slot."""
    found = tuple((block.shape, _torch.name_of(block.dtype)) for block in (y if isinstance(y, (tuple, list)) else (y,)))
    if op.outputs and found != tuple((torch.Size((rows, columns)), dtype) for columns, dtype in op.outputs):
        raise ConfigError(f"op {op.name!r} says that it gives {op.outputs} (columns, dtype), and gives {found}")


def _capture(
    op: Op,
    weights: Mapping[str, torch.Tensor],
    core: _C.Runtime,
    slot: tuple[int, int, int],
    stream: torch.cuda.Stream,
    memory: Any,
    first: bool,
) -> torch.cuda.CUDAGraph:
    """A graph that awaits the rows of a slot (owner, requester, rows), computes the op and puts the answer.

    ``first``: of so many rows, with weights of such shapes. Libraries set themselves up then, which a capture forbids.
    """
    owner, requester, rows = slot
    num_bytes = rows * op.in_features * DTYPE_BYTES[op.dtype]
    view = _C.request_slot(core, owner, requester, num_bytes)
    x = from_dlpack(view).view(_torch.dtype_of(op.dtype)).view(rows, op.in_features)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    try:
        if first:
            check_outputs(op, rows, op.function(weights, x))
            torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=memory, capture_error_mode="thread_local")
            try:
                _C.await_rows(core, owner, requester, rows, num_bytes, stream.cuda_stream)
                y = op.function(weights, x)
                blocks = [block.contiguous() for block in (y if isinstance(y, (tuple, list)) else (y,))]
                sources = [(block.data_ptr(), block.nbytes) for block in blocks]
                _C.put_answer(core, owner, requester, rows, sources, stream.cuda_stream)
            finally:
                graph.capture_end()
    except RuntimeError as error:
        raise UnsupportedError(f"op {op.name!r} cannot be captured as a CUDA graph: {error}") from error
    return graph


def measure(device: int, pool: WeightPool | None) -> MachineProfile:
    """``policy.measure`` for a GPU. What requests take is an estimate, and marked as assumed."""
    from .planner.gpus import request_share

    assumed = ["round_trip_us", "request_bytes_per_s"]
    link = measure_link(device, pool)
    if link is None:
        link = _bundled_link(device)
        assumed.append("copy_bytes_per_s")
    with _room_to_measure(device), torch.cuda.device(device):
        weights = torch.randn(16384, 8192, dtype=torch.bfloat16, device="cuda")
        row, rows = (torch.randn(count, 8192, dtype=torch.bfloat16, device="cuda") for count in (1, 2048))
        flops = 2.0 * weights.numel() * rows.shape[0]
        return MachineProfile(
            copy_bytes_per_s=link,
            request_bytes_per_s=link * request_share(),
            # A request and its answer are two trips of the kind: launch, run, seen by a host thread that polls.
            round_trip_us=2 * _launch_and_seen_us(),
            memory_bytes_per_s=weights.nbytes / _fastest(lambda: torch.nn.functional.linear(row, weights)),
            flops_per_s=flops / _fastest(lambda: torch.nn.functional.linear(rows, weights)),
            assumed=tuple(assumed),
        )


def measure_link(device: int, pool: WeightPool | None) -> float | None:
    """``policy.measure_link`` for a GPU."""
    source = _link_source(device, pool)
    if source is None:
        return None
    with _room_to_measure(device), torch.cuda.device(device):
        target = torch.empty_like(source, device=f"cuda:{device}")
        return float(target.nbytes / _fastest(lambda: target.copy_(source, non_blocking=True)))


@contextlib.contextmanager
def _room_to_measure(device: int) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise CapacityError(
            f"device {device} has no room to measure its profile: {error}. Run `sidp calibrate` while it is free, and "
            "its profile is read instead"
        ) from error


def _link_source(device: int, pool: WeightPool | None) -> torch.Tensor | None:
    """Bytes on another GPU to measure the link with: a peer's layer as mapped here, or memory of a visible GPU."""
    if pool is not None:
        group, placement = pool.group, pool.placement
        # A rank on this GPU is reached through its own memory, which is no link.
        streamed = [i for i in placement.streamed_layers(group.rank) if not group.shares_gpu(placement.owner(i))]
        if streamed:
            layer = max(streamed, key=placement.layer_bytes)
            with contextlib.suppress(SidpError):  # not mapped: it is reached over a network
                return from_dlpack(_C.peer_layer(pool.core, layer))
    for other in range(torch.cuda.device_count()):
        if other != device and torch.cuda.can_device_access_peer(device, other):
            with contextlib.suppress(torch.cuda.OutOfMemoryError):  # others use it: perhaps the next one
                return torch.ones(_LINK_BYTES, dtype=torch.uint8, device=f"cuda:{other}")
    return None


def bundled_rates(device: int) -> MachineProfile | None:
    """Those of the bundled profile of this GPU, by its name; None if none is."""
    from .planner.gpus import GpuProfile

    profile = GpuProfile.of_device(torch.cuda.get_device_name(device))
    return None if profile is None else profile.rates


def _bundled_link(device: int) -> float:
    """The link of the bundled profile of this GPU; its own memory would say nothing of one."""
    if (rates := bundled_rates(device)) is not None:
        return rates.copy_bytes_per_s
    name = torch.cuda.get_device_name(device)
    raise ConfigError(
        f"the link of device {device} ({name}) cannot be measured, and no bundled profile is of this GPU: no other "
        f"GPU is visible here with {_LINK_BYTES >> 20} MiB free, and no pool was given that has a rank on another GPU. "
        "Give one (ModePolicy.calibrated(device=..., pool=...)) or run `sidp calibrate` where two GPUs are visible"
    )


def _launch_and_seen_us(rounds: int = 200) -> float:
    """Median microseconds from the launch of a small kernel until the host has seen its end."""
    word = torch.zeros(1, device="cuda")
    stream = torch.cuda.current_stream()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        word.add_(1)
        while not stream.query():
            pass
        taken.append((time.perf_counter() - start) * 1e6)
    return statistics.median(taken)


def stream_seconds(call: Callable[[], object], count: int = 1) -> float:
    """Of one of ``count`` calls, by events on the current stream: what other streams do meanwhile does not count."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / count


def _fastest(call: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of the fastest of some calls."""
    return min(stream_seconds(call) for _ in range(repeats))
