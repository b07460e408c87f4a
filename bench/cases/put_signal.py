"""Rows and a flag to the other rank and back: this package's puts, and its request and answer, beside peers' puts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from sidp_runtime import LayerSpec, Mode, Op, Placement, Runtime, TensorSpec, WeightPool
from sidp_runtime._torch import dtype_of
from sidp_runtime.manifest import DTYPE_BYTES

from .. import ping_pong
from ..harness import Bar, pairwise
from ..layers import POLICY, Replica
from ..link import Link, open_link
from ..ping_pong import WORD, memcpy_write_value, nvshmem_put_signal, round_trips
from ..rank import IDLE, RankContext, Sample, Subject, WrongDataError

ROW = 1 << 10  # bytes
TRIPS = 20  # in one step
BAR_BYTES = 64 << 10


def echo(w: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Rows of no negative element come back as they are: the least an op can do."""
    return functional.relu(x)


def run(context: RankContext) -> None:
    sizes = [ROW, 64 * ROW] if context.quick else [ROW, 8 * ROW, 64 * ROW, 256 * ROW, 1024 * ROW]
    dtype = context.shape.dtype
    columns = ROW // DTYPE_BYTES[dtype]
    layers = [LayerSpec(f"layers.{i}", (TensorSpec("w", (columns,), dtype),)) for i in range(context.world_size)]
    placement = Placement.by_layer([layer.num_bytes for layer in layers], context.world_size)
    op = Op("echo", echo, columns, dtype, {i: {"w": "w"} for i in range(len(layers))})
    counter = [0]
    with open_link(context, 2 * max(sizes) + WORD) as link, WeightPool(context.group, layers, placement) as pool:
        link.own[-WORD:].zero_()
        pool.publish()
        rows = [size // ROW for size in sizes]
        buckets = {"row_buckets": rows} if context.on_gpu else {}
        with Runtime(pool, policy=POLICY, ops=[op], max_rows=rows[-1], **buckets) as runtime:  # type: ignore[arg-type]
            replica = Replica(context, context.shape, pool, runtime)
            for size in sizes:
                _one_size(context, replica, link, size, counter)
            context.synchronize()
            context.meet()


def _one_size(context: RankContext, replica: Replica, link: Link, size: int, counter: list[int]) -> None:
    rows = size // ROW
    dtype = dtype_of(context.shape.dtype)
    x = torch.rand(rows, ROW // dtype.itemsize, device=context.device).to(dtype)
    layer = context.peer

    def ask() -> torch.Tensor:
        y = x
        for _ in range(TRIPS):
            answer = replica.runtime.remote_compute(layer, "echo", y)
            assert isinstance(answer, torch.Tensor)
            y = answer
        return y

    def eager() -> torch.Tensor:
        with replica.step(rows, Mode.CAS):
            return ask()

    def trips(graph: bool) -> Subject:
        def prepare() -> tuple[Sample, int]:
            if context.rank != 0:
                return IDLE
            back = eager()
            context.synchronize()
            replica.runtime.check()
            if not torch.equal(back, x):
                raise WrongDataError(f"{rows} rows did not come back as they were sent")
            call: Callable[[], object] = replica.captured_by(rows, Mode.CAS, ask) if graph else eager
            sample, most = context.sampled(call, 0.02 if context.quick else 0.05, most=30)
            return (lambda n: sample(n) / TRIPS), most

        return prepare

    subjects = {"sidp_request": trips(False)}
    if context.on_gpu:
        subjects["sidp_request_graph"] = trips(True)
        for make in (ping_pong.sidp, nvshmem_put_signal, memcpy_write_value):
            subjects[make.__name__] = round_trips(context, link, size, make, counter)
            subjects[f"{make.__name__}_graph"] = round_trips(context, link, size, make, counter, TRIPS)
    samples = context.contest(subjects)
    parameters = {"bytes": size}
    context.record(samples, "round_trip", "us", lambda s: s * 1e6, higher_is_better=False, parameters=parameters)
    context.record(
        samples, "bandwidth", "GB/s", lambda s: 2 * size / s / 1e9, higher_is_better=True, parameters=parameters
    )
    for form in ("", "_graph") if context.on_gpu else ():  # like with like: from Python, or captured
        own, peer = f"sidp{form}", f"{nvshmem_put_signal.__name__}{form}"
        row: dict[str, Any] = {"parameters": parameters, "higher_is_better": True}
        if own in samples.seconds and peer in samples.seconds:
            row["samples"] = pairwise(samples.seconds[peer], samples.seconds[own])
            row["bar"] = Bar(2.0, at_least=True, gpus=2) if form and size <= BAR_BYTES else None
        else:
            status, reason = samples.missing.get(own) or samples.missing[peer]
            row |= {"status": status, "reason": reason}
        context.figure("over_nvshmem", own, "x", **row)
