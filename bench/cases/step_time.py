"""Steps over tokens: WaS and CaS with all replicas busy, all layers here, peers, and the floor under WaS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from sidp_runtime import Mode

from ..event_ring import EventRing
from ..harness import Bar, pairwise
from ..layers import Replica, Weights, captured_call, open_replica
from ..link import open_link
from ..peers import RAW, RAW_WAYS, process_group, transfer
from ..rank import RankContext, Samples
from ..timeline import record_timeline

WAS_BAR = Bar(1.04, at_least=False, gpus=2)  # over max(all layers here, link floor)
CAS_BAR = Bar(1.15, at_least=False, gpus=2)  # over all layers here, up to:
CAS_BAR_TOKENS = 128


def run(context: RankContext) -> None:
    tokens = context.shape.step_tokens(context.quick)
    buckets = tuple(count for count in tokens if count <= context.shape.cas_rows)
    with open_replica(context, buckets=buckets) as replica:
        link = _link(context, replica)
        replica.verify()
        offload = EventRing.from_pinned(replica)
        # Its step is long and the same whatever the tokens are, until products take longer than the host's link.
        offloaded = {tokens[0], tokens[len(tokens) // 2], tokens[-1]}
        for count in tokens:
            _one_count(context, replica, count, link, offload if count in offloaded else None)
        if context.on_gpu:
            record_timeline(replica, tokens[len(tokens) // 2])


def _link(context: RankContext, replica: Replica) -> Samples:
    """Of one layer's bytes by the raw copy, all ranks at once: as the step has them."""
    size, names = replica.layer_bytes, RAW_WAYS[context.backend]
    with open_link(context, size) as ends:
        everyone = set(range(context.world_size))
        sample_s = 0.02 if context.quick else 0.1
        samples = context.contest(
            {name: transfer(context, ends, name, context.peer, size, everyone, sample_s) for name in names}
        )
    context.record(samples, "link", "GB/s", lambda s: size / s / 1e9, higher_is_better=True)
    return samples


def _one_count(context: RankContext, replica: Replica, count: int, link: Samples, offload: EventRing | None) -> None:
    x, pace = replica.rows(count), context.pace(count)
    subject = partial(context.steps, pace=pace)
    subjects = {"all_local": subject(lambda: lambda: replica.all_local(x))}
    subjects["sidp_was"] = subject(lambda: lambda: replica.eager(x, Mode.WAS))
    if context.on_gpu:
        subjects["all_local_graph"] = subject(lambda: captured_call(context, lambda: replica.all_local(x)))
        subjects["sidp_was_graph"] = subject(lambda: replica.captured(x, Mode.WAS))
    if count <= context.shape.cas_rows:
        subjects["sidp_cas"] = subject(lambda: lambda: replica.eager(x, Mode.CAS))
        if context.on_gpu:
            subjects["sidp_cas_graph"] = subject(lambda: replica.captured(x, Mode.CAS))
    if offload is not None:
        subjects["pinned_offload"] = subject(lambda: lambda: offload.step(x))
    subjects["tensor_parallel"] = subject(lambda: _tensor_parallel(replica, count))
    samples = context.contest(subjects, pace=pace, clock=True)
    context.synchronize()
    replica.runtime.check()
    parameters = {"tokens": count}
    context.record(samples, "step", "ms", lambda s: s * 1e3, higher_is_better=False, parameters=parameters)
    context.record_clocks(samples, parameters)
    _ratios(context, samples, count, link, len(replica.streamed))


def _ratios(context: RankContext, samples: Samples, count: int, link: Samples, streamed: int) -> None:
    """What the bars hold, eager and captured; where a side is missing the row says why."""
    parameters, raw = {"tokens": count}, RAW[context.backend]

    def over(metric: str, own: str, other: str, under: Sequence[float], bar: Bar | None) -> None:
        row: dict[str, Any] = {"parameters": parameters, "higher_is_better": False}
        if own in samples.seconds and under:
            row |= {"samples": pairwise(samples.seconds[own], under), "bar": bar}
        else:
            missing = samples.missing
            status, reason = missing.get(own) or missing.get(other) or link.missing[raw]
            row |= {"status": status, "reason": reason}
        context.figure(metric, own, "x", **row)

    for form in ("", "_graph") if context.on_gpu else ("",):
        local = samples.seconds.get(f"all_local{form}", [])
        floor = [max(here, streamed * s) for here, s in zip(local, link.seconds.get(raw, []), strict=False)]
        if floor:
            milliseconds = tuple(s * 1e3 for s in floor)
            context.figure("floor", f"floor{form}", "ms", parameters=parameters, samples=milliseconds)
        over("over_floor", f"sidp_was{form}", f"all_local{form}", floor, WAS_BAR)
        if f"sidp_cas{form}" in {*samples.seconds, *samples.missing}:
            bar = CAS_BAR if count <= CAS_BAR_TOKENS else None
            over("over_local", f"sidp_cas{form}", f"all_local{form}", local, bar)


def _tensor_parallel(replica: Replica, count: int) -> Callable[[], object]:
    """The same layers cut over the ranks, all replicas' tokens in one batch, two all-reduces a layer."""
    context, shape, world = replica.context, replica.shape, replica.context.world_size
    process_group(context)

    def cut(weights: Weights, part: int) -> dict[str, torch.Tensor]:
        split = {"o": 1, "gate": 0, "up": 0, "down": 1, "qkv": 0}
        return {name: weights[name].chunk(world, axis)[part] for name, axis in split.items()}

    layers = [cut(weights, i % world) for i, weights in enumerate(replica.local_layers)]
    start = replica.rows(count * world)
    columns = shape.attention // world

    def step() -> None:
        x, residual = start[:, :columns], start[:, shape.attention :]
        for w in layers:
            rows = functional.linear(x, w["o"])
            dist.all_reduce(rows)
            residual = residual + rows
            gated = functional.silu(functional.linear(residual, w["gate"])) * functional.linear(residual, w["up"])
            rows = functional.linear(gated, w["down"])
            dist.all_reduce(rows)
            residual = residual + rows
            x = functional.linear(residual, w["qkv"])[:, :columns]

    return captured_call(context, step) if context.on_gpu else step
