"""Whole layers through the runtime's ring, beside every other way to bring the same bytes here."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sidp_runtime import LayerSpec, Mode, Placement, Runtime, TensorSpec, WeightPool

from ..harness import Bar, pairwise
from ..layers import POLICY, layer_specs
from ..link import Link, open_link
from ..peers import COLLECTIVES, COPIES, RAW, transfer
from ..rank import IDLE, RankContext, Sample, Subject, WrongDataError

LAYERS = 8  # half of them streamed to each of two ranks
MIB = 1 << 20


def run(context: RankContext) -> None:
    layer = layer_specs(context.shape)[0].num_bytes
    sizes = sorted({size for size in context.shape.copy_sizes(context.quick) if size < layer} | {layer})
    with open_link(context, max(sizes)) as link:
        for size in sizes:
            _one_size(context, link, size)


def _one_size(context: RankContext, link: Link, size: int) -> None:
    sample_s = 0.01 if context.quick else 0.04
    raw = RAW[context.backend]
    layers = [LayerSpec(f"layers.{i}", (TensorSpec("w", (size,), "uint8"),)) for i in range(LAYERS)]
    placement = Placement.by_layer([size] * LAYERS, context.world_size)
    with WeightPool(context.group, layers, placement) as pool:
        for i in pool.local_layers:
            pool.layer_view(i)["w"].copy_(link.expected(i, size))
        pool.publish()
        with Runtime(pool, policy=POLICY) as runtime:
            subjects: dict[str, Subject] = {"sidp": _ring(context, link, runtime, size, graph=False, sample_s=sample_s)}
            if context.on_gpu:
                subjects["sidp_graph"] = _ring(context, link, runtime, size, graph=True, sample_s=sample_s)
            for name in (*COPIES[context.backend], *COLLECTIVES[context.backend]):
                subjects[name] = transfer(context, link, name, 1, size, {0}, sample_s)
            samples = context.contest(subjects)
            context.synchronize()
            context.meet()
    parameters = {"bytes": size}
    context.record(samples, "bandwidth", "GB/s", lambda s: size / s / 1e9, higher_is_better=True, parameters=parameters)
    if "sidp" not in samples.seconds:
        return
    own = "sidp_graph" if "sidp_graph" in samples.seconds else "sidp"
    mine = samples.seconds[own]
    if raw in samples.seconds:
        bar = Bar(0.98, at_least=True, gpus=2) if size >= 16 * MIB else None
        ratio = pairwise(samples.seconds[raw], mine)
        context.figure("over_raw", own, "x", parameters=parameters, samples=ratio, higher_is_better=True, bar=bar)
    others = [s for name, s in samples.seconds.items() if not name.startswith("sidp") and name != raw]
    if others:
        bar = Bar(0.98, at_least=True, gpus=2) if size >= 4 * MIB else None  # a tie is 2 % wide
        ratio = pairwise([min(column) for column in zip(*others, strict=True)], mine)
        context.figure(
            "over_fastest_peer", own, "x", parameters=parameters, samples=ratio, higher_is_better=True, bar=bar
        )


def _ring(context: RankContext, link: Link, runtime: Runtime, size: int, *, graph: bool, sample_s: float) -> Subject:
    """Rank 0 streams all its layers, fetching and releasing each at once; rank 1 only owns."""
    streamed = runtime.pool.placement.streamed_layers(context.rank)

    def step() -> None:
        with runtime.step(num_tokens=1):
            body()

    def body() -> None:
        for i in streamed:
            runtime.fetch_layer(i)
            runtime.release_layer(i)

    def prepare() -> tuple[Sample, int]:
        if context.rank != 0:
            return IDLE
        arrived = []
        with runtime.step(num_tokens=1):
            for i in streamed:
                arrived.append(torch.equal(runtime.fetch_layer(i)["w"], link.expected(i, size)))
                runtime.release_layer(i)
        if not all(arrived):
            raise WrongDataError(f"streamed layers {streamed} arrived as they are at their owners: {arrived}")
        call: Callable[[], None] = step
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, capture_error_mode="thread_local"), runtime.capture_step(1, Mode.WAS):
                body()

            def call() -> None:
                with runtime.replay_step(1) as replayed:
                    replayed.replay(captured)

        # One step before the timed ones fills the lane's queue: what is timed starts and ends with a copy's arrival.
        sample, most = context.sampled(call, sample_s, most=60, spin=True)
        return (lambda n: sample(n) / len(streamed)), most

    return prepare
