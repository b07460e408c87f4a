"""WaS steps whose replicas start together, 1 ms apart or at random; CaS with all busy or one; and what is predicted.

On three GPUs and more WaS is also run with links that readers share, as the hardware has it (``sidp_shared_...``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random
from statistics import mean, median

from sidp_runtime import Mode
from sidp_runtime.simulator import SimulationConfig, simulate

from ..harness import Bar, pairwise
from ..layers import Replica, enough_layers, open_replica
from ..link import open_link
from ..peers import RAW, transfer
from ..rank import IDLE, RankContext, Sample, Subject

STAGGER_MS = 1.0
GAP_MS = 1.0  # a random pause in [0, GAP_MS] ahead of each step
BAR = Bar(1.10, at_least=False, gpus=4)  # of max(all layers here, link floor), unless in phase
SIMULATED_STEPS = 20


def run(context: RankContext) -> None:
    shape = enough_layers(context.shape, context.world_size)
    tokens = shape.step_tokens(context.quick)
    counts = tokens if context.quick else tokens[len(tokens) // 2 - 2 :: 2]
    buckets = tuple(sorted({1, *(count for count in counts if count <= shape.cas_rows)}))
    slots = 2 if context.world_size < 4 else 3  # docs/simulator.md, "Exclusive links"
    with open_replica(context, shape, buckets=buckets, ring_slots=slots) as replica:
        shared_too = replica.runtime.stats()["exclusive_links"]
        with open_link(context, replica.layer_bytes) as link:
            name, everyone = RAW[context.backend], set(range(context.world_size))
            subject = transfer(context, link, name, context.peer, replica.layer_bytes, everyone, 0.05)
            copies = context.contest({name: subject})
            copy_s = copies.seconds[name]
            context.record(copies, "copy", "ms", lambda s: s * 1e3, higher_is_better=False,
                           parameters={"ranks": context.world_size, "bytes": replica.layer_bytes})  # fmt: skip
        replica.verify()
        for count in counts:
            _one_count(context, replica, count, copy_s, exclusive=True)
    if shared_too:
        with open_replica(context, shape, ring_slots=slots, exclusive_links=False) as replica:
            for count in counts:
                _one_count(context, replica, count, copy_s, exclusive=False)


def _one_count(context: RankContext, replica: Replica, count: int, copy_s: list[float], *, exclusive: bool) -> None:
    prefix = "sidp" if exclusive else "sidp_shared"
    slots = replica.pool.placement.num_slots(context.rank)
    x = replica.rows(count)
    parameters: dict[str, int | str] = {"ranks": context.world_size, "slots": slots, "tokens": count}
    pace, random = context.pace(count), Random(context.rank)

    def step(mode: Mode) -> Callable[[], object]:
        return lambda: replica.eager(x, mode)

    def plain(call: Callable[[], object], ranks: set[int] | None = None) -> Subject:
        return (lambda: IDLE) if ranks and context.rank not in ranks else context.steps(lambda: call, pace)

    def staggered() -> tuple[Sample, int]:
        sample, most = context.steps(lambda: step(Mode.WAS), pace)()

        def late(n: int) -> float:
            time.sleep(context.rank * STAGGER_MS / 1e3)
            return sample(n)

        return late, most

    def at_random() -> tuple[Sample, int]:
        _, most = context.steps(lambda: step(Mode.WAS), pace)()

        def sample(n: int) -> float:
            taken = 0.0
            for _ in range(n):
                time.sleep(random.uniform(0, GAP_MS) / 1e3)
                start = time.perf_counter()
                replica.eager(x, Mode.WAS)
                context.finish()
                taken += time.perf_counter() - start
            return taken / n

        return sample, most

    subjects: dict[str, Subject] = {
        "all_local": plain(lambda: replica.all_local(x)),
        f"{prefix}_was_in_phase": plain(step(Mode.WAS)),
        f"{prefix}_was_staggered": staggered,
        f"{prefix}_was_random": at_random,
    }
    if exclusive and count <= replica.shape.cas_rows:
        subjects["sidp_cas_all"] = plain(step(Mode.CAS))
        subjects["sidp_cas_one"] = plain(step(Mode.CAS), {0})
    samples = context.contest(subjects, pace=pace, clock=True)
    context.synchronize()
    replica.runtime.check()
    if not exclusive:
        parameters["links"] = "shared"
    context.record(samples, "step", "ms", lambda s: s * 1e3, higher_is_better=False, parameters=parameters)
    context.record_clocks(samples, parameters)
    if context.rank == 0 and "all_local" in samples.seconds:
        local = samples.seconds["all_local"]
        floor = [max(a, b * len(replica.streamed)) for a, b in zip(local, copy_s, strict=True)]
        context.figure("floor", "floor", "ms", parameters=parameters, samples=tuple(s * 1e3 for s in floor))
        for arrival in ("in_phase", "staggered", "random"):
            subject = f"{prefix}_was_{arrival}"
            if (seconds := samples.seconds.get(subject)) is None:
                continue
            bar = BAR if exclusive and arrival != "in_phase" else None
            context.figure("over_floor", subject, "x", parameters=parameters, higher_is_better=False,
                           samples=pairwise(seconds, floor), bar=bar)  # fmt: skip
            predicted_ms = _simulated_ms(replica, count, arrival, median(local), median(copy_s))
            context.figure("simulated", subject, "ms", parameters=parameters, samples=(predicted_ms,))
            context.figure("over_simulated", subject, "x", parameters=parameters,
                           samples=tuple(s * 1e3 / predicted_ms for s in seconds))  # fmt: skip


def _simulated_ms(replica: Replica, count: int, arrival: str, local_s: float, copy_s: float) -> float:
    """Mean step of the slowest replica. Inputs are measured apart: all layers here, and one raw copy."""
    world, num_layers = replica.context.world_size, replica.shape.layers
    slots = replica.pool.placement.num_slots(replica.context.rank)
    result = simulate(
        SimulationConfig(
            world_size=world,
            layer_bytes=(replica.layer_bytes,) * num_layers,
            layer_ms=local_s * 1e3 / num_layers,
            link_gbps=replica.layer_bytes / copy_s / 1e9,
            ring_slots=slots,
            warm_slots=slots,
            num_steps=SIMULATED_STEPS,
            rows=count,
            start_ms=tuple(rank * STAGGER_MS * (arrival == "staggered") for rank in range(world)),
            gap_ms=GAP_MS if arrival == "random" else 0.0,
            exclusive_links=replica.runtime.stats()["exclusive_links"],
        )
    )
    return max(mean(one.step_ms[1:]) for one in result.replicas)
