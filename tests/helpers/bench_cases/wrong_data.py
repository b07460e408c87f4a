"""The owner's bytes change between their publishing and the check."""

from __future__ import annotations

from bench.link import open_link
from bench.peers import transfer
from bench.rank import RankContext


def run(context: RankContext) -> None:
    with open_link(context, 1 << 16) as link:
        if context.rank == 1:
            link.own[12345] += 1
        context.meet()
        samples = context.contest({"memcpy": transfer(context, link, "memcpy", 1, 1 << 16, {0}, 0.01)})
        context.record(samples, "bandwidth", "GB/s", lambda s: 1 / s, higher_is_better=True)
