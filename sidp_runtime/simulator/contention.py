"""What ``csrc/core/contention.cpp`` holds: how long a WaS step takes where replicas meet at the owners' links.

python -m sidp_runtime.simulator.contention  # prints its table
"""

from __future__ import annotations

from random import Random
from statistics import mean

from .. import _C
from .config import SimulationConfig
from .simulate import simulate

WORK = (0.0, 1.0, 1.5, 1.75, 2.0, 2.5, 3.0)  # compute of a step over the stream on a link of its own
_SEEDS = 2
_STEPS = 4
_DRIFT = 0.02  # gap ahead of a step as a share of the stream, and spread of compute


def steps_over_stream(replicas: int) -> tuple[float, ...]:
    """Step over the stream's time on a link of its own, for each compute of ``WORK`` such times."""
    found: list[float] = []
    for i, work in enumerate(WORK):
        value = max(1.0, work, mean(_simulated(replicas, work, seed) for seed in range(_SEEDS)))
        if found:
            value = min(max(value, found[-1]), found[-1] + work - WORK[i - 1])
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


if __name__ == "__main__":
    for count in range(3, _C.LARGEST_SIMULATED + 1):
        print(f"    {{{', '.join(f'{value:.4f}' for value in steps_over_stream(count))}}},  // {count}")
