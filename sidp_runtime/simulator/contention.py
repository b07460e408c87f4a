"""What ``csrc/core/contention.cpp`` holds: how long a WaS step takes where replicas meet at the owners' links.

python -m sidp_runtime.simulator.contention           # prints its table, in about a minute
python -m sidp_runtime.simulator.contention --shared  # beside links that hardware shares, as docs/simulator.md has it
"""

from __future__ import annotations

import sys
from itertools import pairwise
from random import Random
from statistics import mean

from .. import _C
from .config import SimulationConfig
from .simulate import simulate

# Compute of a step over the stream on a link of its own. Closest where layers and copies take about as long: there
# replicas fall into one of several rounds, some of which leave links idle.
WORK = (0.0, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0)
_REPLICAS_TIMES_SEEDS = 96  # the fewer replicas, the more a step depends on their starts
_STEPS = 4
_DRIFT = 0.02  # gap ahead of a step as a share of the stream, and spread of compute


def steps_over_stream(replicas: int) -> tuple[float, ...]:
    """Step over the stream's time on a link of its own, for each compute of ``WORK`` such times.

    Nowhere less than simulated, nor than its floor: raised just as far as it takes for the step never to fall with
    the work, and what the stream adds to the work never to grow.
    """
    found: list[float] = []
    for work in WORK:
        found.append(max(1.0, work, mean_step(replicas, work), *found))
    for i, (work, longer) in reversed(list(enumerate(pairwise(WORK)))):
        found[i] = max(found[i], found[i + 1] - (longer - work))
    return tuple(found)


def mean_step(replicas: int, work: float, exclusive_links: bool = True) -> float:
    """Over random starts, in units of the stream: layers of 1 ms a copy, four from each owner, two-slot rings."""
    seeds = range(_REPLICAS_TIMES_SEEDS // replicas)
    return mean(_simulated(replicas, work, seed, exclusive_links) for seed in seeds)


def _simulated(replicas: int, work: float, seed: int, exclusive_links: bool) -> float:
    """Mean step, the first left out."""
    layers, streamed = 4 * replicas, 4 * (replicas - 1)
    random = Random(seed)
    config = SimulationConfig(
        world_size=replicas,
        layer_bytes=(1_000_000,) * layers,
        layer_ms=work * streamed / layers,
        link_gbps=1.0,
        exclusive_links=exclusive_links,
        warm_slots=2,
        num_steps=_STEPS,
        start_ms=tuple(random.uniform(0, streamed) for _ in range(replicas)),
        gap_ms=_DRIFT * streamed,
        jitter=_DRIFT,
        seed=seed,
    )
    return mean(ms for replica in simulate(config).replicas for ms in replica.step_ms[1:]) / streamed


def _compare() -> None:
    """Steps over max(compute, stream), as Markdown."""
    print(f"| replicas | links | {' | '.join(f'{work:g}' for work in WORK)} |")
    print("| ---: | --- |" + " ---: |" * len(WORK))
    for count in (3, 4, 8):
        for exclusive in (False, True):
            values = (mean_step(count, work, exclusive) / max(1.0, work) for work in WORK)
            name = "exclusive" if exclusive else "shared"
            print(f"| {count} | {name} | {' | '.join(f'{value:.2f}' for value in values)} |")


if __name__ == "__main__":
    if "--shared" in sys.argv:
        _compare()
    else:
        for count in range(3, _C.LARGEST_SIMULATED + 1):
            print(f"    {{{', '.join(f'{value:.4f}' for value in steps_over_stream(count))}}},  // {count}", flush=True)
