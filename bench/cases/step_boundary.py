"""What filling the head of the next step during the tail of this one saves, over a ring filled inside each step."""

from __future__ import annotations

from collections.abc import Callable

from sidp_runtime import Mode

from ..event_ring import EventRing
from ..layers import Replica, open_replica
from ..rank import RankContext, Unavailable
from ..timeline import waits_and_compute


def run(context: RankContext) -> None:
    with open_replica(context) as replica:
        replica.verify()
        tokens = context.shape.step_tokens(context.quick)
        for count in tokens[-2:] if context.quick else tokens[len(tokens) // 2 :]:
            _one_count(context, replica, count)


def _one_count(context: RankContext, replica: Replica, count: int) -> None:
    x, pace = replica.rows(count), context.pace(count)

    def prefetch_in_step() -> Callable[[], object]:
        if not context.on_gpu:
            raise Unavailable("the host backend gives no view of a peer's layers")
        ring = EventRing.from_peers(replica)
        return lambda: ring.step(x)

    subjects = {
        "sidp_was": context.steps(lambda: lambda: replica.eager(x, Mode.WAS), pace),
        "prefetch_in_step": context.steps(prefetch_in_step, pace),
        "all_local": context.steps(lambda: lambda: replica.all_local(x), pace),
    }
    parameters = {"tokens": count}
    samples = context.contest(subjects, pace=pace)
    context.record(samples, "step", "ms", lambda s: s * 1e3, higher_is_better=False, parameters=parameters)
    if not context.on_gpu:
        context.figure("first_wait", "sidp_was", "ms", parameters=parameters, higher_is_better=False,
                       status="unavailable", reason="only a stream's events tell waiting from computing")  # fmt: skip
        return
    waits = []
    for _ in range(context.repeats):
        context.meet()
        entries = waits_and_compute(replica, count, 2)
        first = min(entry["layer"] for entry in entries if entry["streamed"])
        waits.append(max(context.gather(entries[replica.shape.layers + first]["wait_ms"])))
    context.figure("first_wait", "sidp_was", "ms", parameters=parameters, samples=tuple(waits), higher_is_better=False)
