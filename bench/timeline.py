"""When a WaS step's layers waited and computed: entries of the report's timeline."""

from __future__ import annotations

from typing import Any

import torch

from sidp_runtime import Mode

from .layers import Replica, block, next_rows

STEPS = 2


def waits_and_compute(replica: Replica, tokens: int, steps: int) -> list[dict[str, Any]]:
    """Of each layer of the last ``steps`` eager WaS steps: start, ms waiting for it and ms computing, on the stream."""
    x = replica.rows(tokens)
    replica.eager(x, Mode.WAS)
    marks: list[tuple[int, int, Any, Any, Any]] = []

    def mark() -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    first = mark()
    for number in range(steps):
        y = x
        with replica.step(tokens, Mode.WAS):
            for layer in range(replica.shape.layers):
                asked = mark()
                weights = replica.runtime.fetch_layer(layer)
                got = mark()
                y = next_rows(replica.shape, *block(weights, y))
                replica.runtime.release_layer(layer)
                marks.append((number, layer, asked, got, mark()))
    replica.context.synchronize()
    return [
        {
            "step": number,
            "layer": layer,
            "streamed": not replica.pool.is_local(layer),
            "start_ms": first.elapsed_time(asked),
            "wait_ms": asked.elapsed_time(got),
            "compute_ms": got.elapsed_time(done),
        }
        for number, layer, asked, got, done in marks
    ]


def record_timeline(replica: Replica, tokens: int) -> None:
    """Every rank's, each on its own clock."""
    replica.context.meet()
    for entry in waits_and_compute(replica, tokens, STEPS):
        replica.context.event(case=replica.context.case, tokens=tokens, **entry)
