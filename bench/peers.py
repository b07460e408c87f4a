"""Other ways to bring bytes from one rank to another: what this package stands beside.

Each maker takes (context, link, owner, num_bytes) and gives a call that enqueues one transfer of ``num_bytes`` from the
owner into ``link.landing``, or raises ``Unavailable``. Collectives are called by all ranks, copies by the puller alone.
Those of WRITES are called by the owner, with the puller in its place, and end in ``link.remote_landing``.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from .link import Link
from .rank import IDLE, RankContext, Sample, Subject, Unavailable

Call = Callable[[], object]
Maker = Callable[[RankContext, Link, int, int], Call]

_BATCH = 8  # copies in one cudaMemcpyBatchAsync
_SAME_GPU = "ranks share a GPU, which this library refuses"


def _module(name: str, package: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise Unavailable(f"{package} is not installed: {error}") from error


def current_stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def checked(result: tuple[Any, ...]) -> None:
    if int(result[0]) != 0:
        raise RuntimeError(f"CUDA says {result[0]!r}")


def memcpy_async(context: RankContext, link: Link, owner: int, num_bytes: int) -> Call:
    return _raw_copy(link.landing, link.remote[owner], num_bytes)


def memcpy_write(context: RankContext, link: Link, puller: int, num_bytes: int) -> Call:
    return _raw_copy(link.remote_landing[puller], link.own, num_bytes)


def _raw_copy(target: torch.Tensor, source: torch.Tensor, num_bytes: int) -> Call:
    runtime = _module("cuda.bindings.runtime", "cuda-bindings")
    kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    dst, src, stream = target.data_ptr(), source.data_ptr(), current_stream()
    return lambda: checked(runtime.cudaMemcpyAsync(dst, src, num_bytes, kind, stream))


def memcpy_batch(context: RankContext, link: Link, owner: int, num_bytes: int) -> Call:
    runtime = _module("cuda.bindings.runtime", "cuda-bindings")
    if not hasattr(runtime, "cudaMemcpyBatchAsync"):
        raise Unavailable("cuda-bindings has no cudaMemcpyBatchAsync")
    piece = num_bytes // _BATCH
    dst = [link.landing.data_ptr() + k * piece for k in range(_BATCH)]
    src = [link.remote[owner].data_ptr() + k * piece for k in range(_BATCH)]
    attributes = runtime.cudaMemcpyAttributes()
    attributes.srcAccessOrder = runtime.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream
    stream = current_stream()
    return lambda: checked(
        runtime.cudaMemcpyBatchAsync(dst, src, [piece] * _BATCH, _BATCH, [attributes], [0], 1, stream)
    )


def nvshmem_get(context: RankContext, link: Link, owner: int, num_bytes: int) -> Call:
    bindings = _module("nvshmem.bindings", "nvshmem4py")
    # Pieces of equal ranks lie at equal offsets, so the own address names the owner's bytes.
    dst, src, stream = link.landing.data_ptr(), link.own.data_ptr(), current_stream()
    return lambda: bindings.getmem_on_stream(dst, src, num_bytes, owner, stream)


def kernel(context: RankContext, link: Link, owner: int, num_bytes: int) -> Call:
    """torch's element-wise kernel (16-byte loads and stores): reads the peer, adds 0, writes here."""
    source = link.remote[owner][:num_bytes].view(torch.int64)
    target = link.landing[:num_bytes].view(torch.int64)
    return lambda: torch.add(source, 0, out=target)


def symmetric_memory(context: RankContext, link: Link, owner: int, num_bytes: int) -> Call:
    """torch's symmetric memory: ``copy_`` from the peer's buffer. Collective."""
    if context.shares_gpu:
        raise Unavailable(_SAME_GPU)
    process_group(context)
    module = _module("torch.distributed._symmetric_memory", "torch")
    own = module.empty(num_bytes, dtype=torch.uint8, device=context.device)
    own.copy_(link.own[:num_bytes])
    handle = module.rendezvous(own, dist.group.WORLD)
    context.synchronize()
    dist.barrier()
    if context.rank == owner:
        return lambda: own
    source, target = handle.get_buffer(owner, (num_bytes,), torch.uint8), link.landing[:num_bytes]
    return lambda: (target.copy_(source, non_blocking=True), own)  # own: lives as long as the call


def pinned_host(context: RankContext, link: Link, owner: int, num_bytes: int) -> Call:
    """What an offloader does: the bytes lie in this rank's pinned host memory."""
    source = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    source.copy_(link.expected(owner, num_bytes))
    target = link.landing[:num_bytes]
    return lambda: target.copy_(source, non_blocking=True)


def broadcast(context: RankContext, link: Link, owner: int, num_bytes: int) -> Call:
    process_group(context)
    rows = (link.own if context.rank == owner else link.landing)[:num_bytes]
    return lambda: dist.broadcast(rows, src=owner)


def all_gather(context: RankContext, link: Link, owner: int, num_bytes: int) -> Call:
    """FSDP2's way: every rank ends with all pieces, ``num_bytes`` of them from other ranks together."""
    process_group(context)
    piece = num_bytes // (context.world_size - 1)
    rows, out = link.own[:piece], link.landing[: piece * context.world_size]
    return lambda: dist.all_gather_into_tensor(out, rows)


def memcpy(context: RankContext, link: Link, owner: int, num_bytes: int) -> Call:
    """One thread copies out of the peer's mapped memory."""
    source, target = link.remote[owner][:num_bytes], link.landing[:num_bytes]
    return lambda: target.copy_(source)


def process_group(context: RankContext) -> None:
    """torch's default group of all ranks, made at the first use. Collective."""
    if dist.is_initialized():
        return
    if context.shares_gpu:
        raise Unavailable(f"NCCL: {_SAME_GPU}")
    arguments: dict[str, Any] = {"device_id": context.device} if context.on_gpu else {}
    dist.init_process_group(
        "nccl" if context.on_gpu else "gloo",
        store=dist.PrefixStore("torch", context.store),  # type: ignore[attr-defined]
        rank=context.rank,
        world_size=context.world_size,
        timeout=datetime.timedelta(seconds=60),
        **arguments,
    )


COPIES: dict[str, dict[str, Maker]] = {
    "nvshmem": {
        "cudaMemcpyAsync": memcpy_async,
        "cudaMemcpyAsync_write": memcpy_write,
        "cudaMemcpyBatchAsync": memcpy_batch,
        "nvshmemx_getmem_on_stream": nvshmem_get,
        "load_store_kernel": kernel,
        "pinned_host": pinned_host,
    },
    "host": {"memcpy": memcpy},
}

COLLECTIVES: dict[str, dict[str, Maker]] = {
    "nvshmem": {
        "torch_symmetric_memory": symmetric_memory,
        "nccl_broadcast": broadcast,
        "nccl_all_gather": all_gather,
    },
    "host": {"gloo_broadcast": broadcast, "gloo_all_gather": all_gather},
}

GATHERS = {"nccl_all_gather", "gloo_all_gather"}
RAW = {"nvshmem": "cudaMemcpyAsync_write", "host": "memcpy"}  # the hardware's limit
READ = {"nvshmem": "cudaMemcpyAsync", "host": "memcpy"}
RAW_WAYS = {backend: tuple(dict.fromkeys((READ[backend], RAW[backend]))) for backend in RAW}
WRITES = {"cudaMemcpyAsync_write"}


def transfer(
    context: RankContext, link: Link, name: str, owner: int, num_bytes: int, pullers: set[int], sample_s: float
) -> Subject:
    """A contest's subject: one transfer from ``owner`` to each of ``pullers``, checked once before it counts.

    All ranks pull, each from the next one, or, of what owners write, there is one puller.
    """
    collective = name in COLLECTIVES[context.backend]
    maker = (COLLECTIVES if collective else COPIES)[context.backend][name]

    def write() -> tuple[Sample, int]:
        everyone = len(pullers) == context.world_size
        if not everyone and context.rank != owner:
            return IDLE
        puller = (context.rank - 1) % context.world_size if everyone else min(pullers)
        call = maker(context, link, puller, num_bytes)
        landed = link.remote_landing[puller][:num_bytes]
        landed.zero_()
        call()
        context.synchronize()
        link.verify_landed(landed, context.rank)
        return context.sampled(call, sample_s, most=100, spin=True)

    def prepare() -> tuple[Sample, int]:
        receives = context.rank in pullers
        if not collective and not receives:
            return IDLE
        call = maker(context, link, owner, num_bytes)
        if receives:
            link.landing.zero_()  # subjects before this one left the same bytes there
        call()
        piece = num_bytes // (context.world_size - 1)
        if receives and name in GATHERS:
            for rank in (r for r in range(context.world_size) if r != context.rank):
                link.verify(rank, piece, rank * piece)
        elif receives:
            link.verify(owner, num_bytes)
        return context.sampled(call, sample_s, most=100, spin=True)  # all of them queued before the spin ends

    return write if name in WRITES else prepare
