"""How long a replica takes to be there, and what it then holds."""

from __future__ import annotations

import time

import torch

from ..layers import enough_layers, open_replica
from ..rank import RankContext

ROWS = 16


def run(context: RankContext) -> None:
    shape = enough_layers(context.shape, context.world_size)
    parameters = {"ranks": context.world_size}
    context.group  # noqa: B018 - on the host it is made here
    free = torch.cuda.mem_get_info(context.device)[0] if context.on_gpu else 0
    context.meet()
    start = time.perf_counter()
    with open_replica(context, shape, buckets=(1, min(ROWS, shape.cas_rows))) as replica:
        ready = time.perf_counter() - start
        taken = free - torch.cuda.mem_get_info(context.device)[0] if context.on_gpu else replica.pool.held_bytes
        replica.verify()
        seconds = {"group": context.group_s, "pool_and_runtime": ready}
        for subject, value in seconds.items():
            slowest = max(context.gather(value))
            context.figure(
                "start", f"sidp_{subject}", "s", parameters=parameters, samples=(slowest,), higher_is_better=False
            )
        held = {
            "full_replica": replica.pool.pooled_bytes,
            "pool_and_ring": max(context.gather(replica.pool.held_bytes)),
            "measured": max(context.gather(taken)),
        }
        for subject, num_bytes in held.items():
            if subject != "measured" or (context.on_gpu and not context.shares_gpu):
                context.figure("memory", subject, "MiB", parameters=parameters, samples=(num_bytes / 2**20,))
