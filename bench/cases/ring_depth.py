"""WaS step time by slots of the ring, all replicas busy."""

from __future__ import annotations

from sidp_runtime import Mode

from ..layers import open_replica
from ..rank import RankContext

SLOTS = (1, 2, 3, 4)


def run(context: RankContext) -> None:
    tokens = context.shape.step_tokens(context.quick)
    counts = tokens[-2:] if context.quick else tokens[len(tokens) // 2 :: 2]
    for slots in SLOTS[:: 2 if context.quick else 1]:
        with open_replica(context, ring_slots=slots) as replica:
            replica.verify()
            for count in counts:
                x = replica.rows(count)
                samples = context.contest(
                    {
                        "sidp_was": lambda x=x: context.sampled(  # type: ignore[misc]
                            lambda: replica.eager(x, Mode.WAS), 0.05 if context.quick else 0.2, most=30, warm=2
                        )
                    }
                )
                context.record(
                    samples,
                    "step",
                    "ms",
                    lambda s: s * 1e3,
                    higher_is_better=False,
                    parameters={"slots": slots, "tokens": count},
                )
