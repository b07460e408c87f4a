"""WaS step time by slots of the ring, all replicas busy."""

from __future__ import annotations

from sidp_runtime import Mode

from ..layers import Replica, open_replica
from ..rank import RankContext

SLOTS = (1, 2, 3, 4)


def run(context: RankContext) -> None:
    tokens = context.shape.step_tokens(context.quick)
    counts = tokens[-2:] if context.quick else tokens[len(tokens) // 2 :: 2]
    for slots in SLOTS[:: 2 if context.quick else 1]:
        with open_replica(context, ring_slots=slots) as replica:
            replica.verify()
            for count in counts:
                _one_count(context, replica, slots, count)


def _one_count(context: RankContext, replica: Replica, slots: int, count: int) -> None:
    x, pace, parameters = replica.rows(count), context.pace(count), {"slots": slots, "tokens": count}
    subject = context.steps(lambda: lambda: replica.eager(x, Mode.WAS), pace)
    samples = context.contest({"sidp_was": subject}, pace=pace)
    context.record(samples, "step", "ms", lambda s: s * 1e3, higher_is_better=False, parameters=parameters)
