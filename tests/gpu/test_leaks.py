"""Device memory over many pools. It reads the whole device's free memory, so nothing else may run there meanwhile."""

from __future__ import annotations

import gc
from typing import Any

import torch
from helpers.models import SyntheticModel
from helpers.processes import RankContext, run_ranks
from helpers.ranks import MODES, PROFILE, Replica

import sidp_runtime as sidp


def open_and_close(context: RankContext, cycles: int) -> dict[str, Any]:
    free = []
    model = SyntheticModel()
    with context.group(backend="nvshmem") as group:
        for cycle in range(cycles):
            with sidp.WeightPool(group, model.layers(), model.placement(2)) as pool:
                model.fill(pool)
                pool.publish()
                cas = cycle % 5 == 0
                policy = sidp.ModePolicy(PROFILE, fixed=MODES["cas" if cas else "was"])
                ops, max_rows = (model.ops(), 2) if cas else ((), 0)
                with sidp.Runtime(pool, policy=policy, ops=ops, max_rows=max_rows) as runtime:
                    Replica(context, model, group, pool, runtime).step(rows=2)
                    context.meet(f"stepped {cycle}")
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            context.meet(f"closed {cycle}")
            free.append(torch.cuda.mem_get_info(group.device)[0])
            context.meet(f"looked {cycle}")
    return {"free": free}


def test_a_hundred_open_close_cycles_leak_no_device_memory() -> None:
    for result in run_ranks(open_and_close, 2, cycles=100, timeout_s=90):
        free = result["free"]
        assert free[10] - free[-1] < 4 << 20, f"{(free[10] - free[-1]) >> 10} KiB lost in 90 cycles"
