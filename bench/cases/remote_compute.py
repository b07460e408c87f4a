"""A square product at the layer's owner, over the same product here: what a request and its answer cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.nn import functional

from sidp_runtime import LayerSpec, Mode, Op, Placement, Runtime, TensorSpec, WeightPool
from sidp_runtime._torch import dtype_of

from ..harness import Bar
from ..layers import POLICY, captured_call
from ..rank import IDLE, RankContext, Sample, Subject, WrongDataError

LAYERS = 8
CALLS = 16  # in one step
HEADLINE_ROWS = 64


def run(context: RankContext) -> None:
    largest = context.shape.cas_rows if not context.on_gpu else 256
    rows = sorted({1, min(16, largest), min(HEADLINE_ROWS, largest), largest})
    with _open(context, rows) as runtime:
        for count in rows[::-1][:2][::-1] if context.quick else rows:
            _one_count(context, runtime, count)


@contextmanager
def _open(context: RankContext, rows: list[int]) -> Iterator[Runtime]:
    hidden, dtype = context.shape.hidden, context.shape.dtype
    layers = [LayerSpec(f"layers.{i}", (TensorSpec("w", (hidden, hidden), dtype),)) for i in range(LAYERS)]
    placement = Placement.by_layer([layer.num_bytes for layer in layers], context.world_size)
    op = Op("product", product, hidden, dtype, {i: {"w": "w"} for i in range(LAYERS)})
    with WeightPool(context.group, layers, placement) as pool:
        for i in pool.local_layers:
            pool.layer_view(i)["w"].normal_(0, hidden**-0.5, generator=_seed(context, i))
        pool.publish()
        buckets = {"row_buckets": rows} if context.on_gpu else {}
        with Runtime(pool, policy=POLICY, ops=[op], max_rows=rows[-1], **buckets) as runtime:  # type: ignore[arg-type]
            yield runtime
            context.synchronize()
            context.meet()


def product(w: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, w["w"])


def _seed(context: RankContext, layer: int) -> torch.Generator:
    return torch.Generator(context.device).manual_seed(layer)


def _one_count(context: RankContext, runtime: Runtime, count: int) -> None:
    from ..layers import Replica

    replica = Replica(context, context.shape, runtime.pool, runtime)
    pool, hidden, dtype = runtime.pool, context.shape.hidden, dtype_of(context.shape.dtype)
    x = torch.randn(count, hidden, generator=_seed(context, 99), device=context.device).to(dtype)
    away, here = replica.streamed, [pool.layer_view(i)["w"] for i in pool.local_layers]
    sample_s = 0.02 if context.quick else 0.1

    def ask(borrow: bool = False) -> torch.Tensor:
        y = x
        for k in range(CALLS):
            answer = runtime.remote_compute(away[k % len(away)], "product", y, borrow=borrow)
            assert isinstance(answer, torch.Tensor)
            y = answer
        return y

    def compute() -> torch.Tensor:
        y = x
        for k in range(CALLS):
            y = functional.linear(y, here[k % len(here)])
        return y

    def eager() -> None:
        with replica.step(count, Mode.CAS):
            ask()

    def verify(borrow: bool) -> None:
        weight = torch.empty(hidden, hidden, dtype=dtype, device=context.device)
        weight.normal_(0, hidden**-0.5, generator=_seed(context, away[0]))
        with replica.step(count, Mode.CAS):
            theirs = runtime.remote_compute(away[0], "product", x, borrow=borrow)
        context.synchronize()
        runtime.check()
        assert isinstance(theirs, torch.Tensor)
        mine = functional.linear(x, weight)
        error = float((theirs - mine).float().norm() / mine.float().norm())
        if not error < 1e-2:
            raise WrongDataError(f"{count} rows computed by their owner are off by {error:.2g} of their norm")

    def remote(graph: bool, borrow: bool = False) -> Subject:
        def prepare() -> tuple[Sample, int]:
            if context.rank != 0:
                return IDLE
            verify(borrow)
            call: Callable[[], None] = eager
            if graph:
                call = replica.captured_by(count, Mode.CAS, lambda: ask(borrow))
            sample, most = context.sampled(call, sample_s, most=60)
            return (lambda n: sample(n) / CALLS), most

        return prepare

    def local() -> tuple[Sample, int]:
        if context.rank != 0:
            return IDLE
        sample, most = context.sampled(
            captured_call(context, compute) if context.on_gpu else compute, sample_s, most=60
        )
        return (lambda n: sample(n) / CALLS), most

    subjects: dict[str, Subject] = {"sidp": remote(False), "local": local}
    if context.on_gpu:
        borrowed = remote(True, borrow=True)
        subjects = {"sidp": remote(False), "sidp_graph": remote(True), "sidp_borrowed_graph": borrowed, "local": local}
    samples = context.contest(subjects)
    parameters = {"rows": count, "columns": hidden}
    context.record(samples, "latency", "us", lambda s: s * 1e6, higher_is_better=False, parameters=parameters)
    for name in ("sidp", "sidp_graph", "sidp_borrowed_graph"):
        if name in samples.seconds and "local" in samples.seconds:
            over = zip(samples.seconds[name], samples.seconds["local"], strict=True)
            held = name == "sidp_borrowed_graph" and count == HEADLINE_ROWS
            context.figure("over_local", name, "us", parameters=parameters, higher_is_better=False,
                           samples=tuple((a - b) * 1e6 for a, b in over),
                           bar=Bar(12.0, False, gpus=2) if held else None)  # fmt: skip
