"""1 to N-1 ranks pull from rank 0 at once: what one owner's link gives each of them."""

from __future__ import annotations

from ..link import open_link
from ..peers import READ, transfer
from ..rank import RankContext


def run(context: RankContext) -> None:
    size = max(context.shape.copy_sizes(context.quick))
    name = READ[context.backend]
    with open_link(context, size) as link:
        for pullers in range(1, context.world_size):
            who = set(range(1, pullers + 1))
            subject = transfer(context, link, name, 0, size, who, 0.01 if context.quick else 0.1)
            context.record(
                context.contest({name: subject}),
                "bandwidth_a_puller",
                "GB/s",
                lambda s: size / s / 1e9,
                higher_is_better=True,
                parameters={"ranks": context.world_size, "pullers": pullers, "bytes": size},
            )
