"""The raw copy between every two ranks, one pair at a time, and by all ranks at once from the next one."""

from __future__ import annotations

from collections.abc import Callable

from ..link import open_link
from ..peers import RAW, transfer
from ..rank import RankContext


def run(context: RankContext) -> None:
    size = max(context.shape.copy_sizes(context.quick))
    sample_s, name, world = (0.01 if context.quick else 0.03), RAW[context.backend], context.world_size
    bandwidth: Callable[[float], float] = lambda s: size / s / 1e9  # noqa: E731
    with open_link(context, size) as link:
        for puller in range(world):
            for owner in (rank for rank in range(world) if rank != puller):
                samples = context.contest({name: transfer(context, link, name, owner, size, {puller}, sample_s)})
                parameters = {"ranks": world, "puller": puller, "owner": owner}
                context.record(samples, "pair", "GB/s", bandwidth, higher_is_better=True, parameters=parameters)
        everyone = set(range(world))
        samples = context.contest({name: transfer(context, link, name, context.peer, size, everyone, sample_s)})
        context.record(
            samples,
            "aggregate",
            "GB/s",
            lambda s: world * size / s / 1e9,
            higher_is_better=True,
            parameters={"ranks": world},
        )
