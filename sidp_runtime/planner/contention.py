"""How long a WaS step takes where replicas meet at the owners' links: simulated, in units of one stream alone.

With two replicas each owner has one puller and nothing is shared. From three on, replicas that drift find the same
owner busy, and what they lose does not depend on sizes: only on how many they are and on the work beside the stream.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache
from random import Random
from statistics import mean

from ..simulator import SimulationConfig, simulate

#: Simulated are at most this many replicas; more wait as long as these do (8 and 16 differ by a tenth).
LARGEST_SIMULATED = 16
_WORK = (0.0, 1.0, 1.5, 1.75, 2.0, 2.5, 3.0)  # compute of a step over the stream on a link of its own
_SEEDS = 2
_STEPS = 4
_DRIFT = 0.02  # gap ahead of a step as a share of the stream, and spread of compute


def step_over_stream(replicas: int, work: float) -> float:
    """Step over the stream's time on a link of its own, for compute of ``work`` such times.

    Lines between simulated points, and beyond the last one what is lost stays the same. Neither the step nor what
    the stream adds to it moves the wrong way with ``work``, so thresholds can be found by bisection.
    """
    if replicas == 2:
        return max(1.0, work)
    table = _table(min(replicas, LARGEST_SIMULATED))
    if work >= _WORK[-1]:
        return work + table[-1] - _WORK[-1]
    right = max(1, bisect_left(_WORK, work))
    x0, x1, y0, y1 = _WORK[right - 1], _WORK[right], table[right - 1], table[right]
    return y0 + (y1 - y0) * (work - x0) / (x1 - x0)


@lru_cache(maxsize=64)
def _table(replicas: int) -> tuple[float, ...]:
    found: list[float] = []
    for i, work in enumerate(_WORK):
        value = max(1.0, work, mean(_simulated(replicas, work, seed) for seed in range(_SEEDS)))
        if found:
            value = min(max(value, found[-1]), found[-1] + work - _WORK[i - 1])
        found.append(value)
    return tuple(found)


def _simulated(replicas: int, work: float, seed: int) -> float:
    """Mean step, the first left out, of layers of 1 ms a copy, four from each owner, two-slot rings, random starts."""
    layers, streamed = 4 * replicas, 4 * (replicas - 1)
    random = Random(seed)
    config = SimulationConfig(
        world_size=replicas,
        layer_bytes=(1_000_000,) * layers,
        layer_ms=work * streamed / layers,
        link_gbps=1.0,
        warm_slots=2,
        num_steps=_STEPS,
        start_ms=tuple(random.uniform(0, streamed) for _ in range(replicas)),
        gap_ms=_DRIFT * streamed,
        jitter=_DRIFT,
        seed=seed,
    )
    return mean(ms for replica in simulate(config).replicas for ms in replica.step_ms[1:]) / streamed
