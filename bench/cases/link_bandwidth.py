"""Raw transfers between ranks 0 and 1: what the link gives, to each way of using it."""

from __future__ import annotations

from ..link import open_link
from ..peers import COLLECTIVES, COPIES, RAW_WAYS, transfer
from ..rank import RankContext


def run(context: RankContext) -> None:
    sizes = context.shape.copy_sizes(context.quick)
    sample_s = 0.01 if context.quick else 0.03
    with open_link(context, max(sizes)) as link:
        for size in sizes:
            for direction in ("one", "both"):
                both = direction == "both"
                # A broadcast has one sender; in both directions only the copies and the all-gather say something.
                every = (*COPIES[context.backend], *COLLECTIVES[context.backend])
                names = RAW_WAYS[context.backend] if both else every
                owner = context.peer if both else 1
                pullers = {0, 1} if both else {0}
                samples = context.contest(
                    {name: transfer(context, link, name, owner, size, pullers, sample_s) for name in names}
                )
                context.record(
                    samples,
                    "bandwidth",
                    "GB/s",
                    lambda seconds, size=size: size / seconds / 1e9,  # type: ignore[misc]
                    higher_is_better=True,
                    parameters={"direction": direction, "bytes": size},
                )
