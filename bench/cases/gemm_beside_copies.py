"""What copies cost matrix products: slower products, waiting for layers, and clocks, each by itself."""

from __future__ import annotations

import torch
from torch.nn import functional

from sidp_runtime._torch import dtype_of

from ..harness import pairwise
from ..layers import Replica, open_replica
from ..link import Link, open_link
from ..peers import COPIES, RAW
from ..rank import DilutedSampleError, RankContext, Sample, Subject, Unavailable
from ..timeline import waits_and_compute

TRIES = 3  # each with twice the copies


def run(context: RankContext) -> None:
    tokens = context.shape.step_tokens(context.quick)
    counts = tokens[-2:] if context.quick else tokens[3:]
    with open_replica(context) as replica:
        replica.verify()
        with open_link(context, replica.layer_bytes) as link:
            for count in counts:
                _products(context, replica, link, count)
        for count in counts:
            _waiting(context, replica, count)


def _products(context: RankContext, replica: Replica, link: Link, count: int) -> None:
    """The gate's product on rows, alone and while the raw copy keeps the link busy; every rank does the same."""
    weights = [layer["gate"] for layer in replica.local_layers]
    x = torch.randn(count, context.shape.hidden, device=context.device).to(dtype_of(context.shape.dtype))
    sample_s = 0.02 if context.quick else 0.1

    def products() -> None:
        for w in weights:
            functional.linear(x, w)

    def alone() -> tuple[Sample, int]:
        sample, most = context.sampled(products, sample_s, spin=True)
        return (lambda n: sample(n) / len(weights)), most

    def beside() -> tuple[Sample, int]:
        if not context.on_gpu:
            raise Unavailable("the host backend's copies are threads: their share of the processor is the scheduler's")
        lane = torch.cuda.Stream(context.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(lane):
            copy = COPIES[context.backend][RAW[context.backend]](context, link, context.peer, replica.layer_bytes)
            copy_s = context.time(copy, 2)
        _, most = context.sampled(products, sample_s, spin=True)

        def sample(n: int) -> float:
            copies = 2 + int(3 * sample_s / copy_s)
            for _ in range(TRIES):
                copying, copied = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]
                with torch.cuda.stream(lane):
                    copy()
                    copying.record()
                    for _ in range(copies):
                        copy()
                    copied.record()
                copying.wait()  # no product begins before the lane does
                seconds = context.time_on_busy_device(products, n)
                # The last product has ended: were there copies until then?
                busy = not copied.query()  # type: ignore[no-untyped-call]
                context.synchronize()
                if busy:
                    return seconds / len(weights)
                copies *= 2
            raise DilutedSampleError(f"{copies // 2} copies ended before {n * len(weights)} products of {count} rows")

        return sample, most

    subjects: dict[str, Subject] = {"alone": alone, "beside_copies": beside}
    samples = context.contest(subjects, clock=True)
    parameters = {"rows": count}
    context.record(samples, "product", "us", lambda s: s * 1e6, higher_is_better=False, parameters=parameters)
    if len(samples.seconds) == 2:
        slowdown = pairwise(samples.seconds["beside_copies"], samples.seconds["alone"])
        context.figure("slowdown", "beside_copies", "x", parameters=parameters, samples=slowdown)
    context.record_clocks(samples, parameters)


def _waiting(context: RankContext, replica: Replica, count: int) -> None:
    """Of a WaS step: ms that the stream waited for layers, and ms that its products took beyond those of local ones."""
    parameters = {"tokens": count}
    if not context.on_gpu:
        context.figure("waiting", "sidp_was", "ms", parameters=parameters, status="unavailable",
                       reason="only a stream's events tell waiting from computing")  # fmt: skip
        return
    waits, computes = [], []
    for _ in range(context.repeats):
        context.meet()
        entries = waits_and_compute(replica, count, 2)[replica.shape.layers :]
        waits.append(sum(entry["wait_ms"] for entry in entries))
        computes.append(sum(entry["compute_ms"] for entry in entries))
    context.figure("waiting", "sidp_was", "ms", parameters=parameters, samples=tuple(waits))
    context.figure("computing", "sidp_was", "ms", parameters=parameters, samples=tuple(computes))
    x = replica.rows(count)
    local = context.contest({"all_local": lambda: context.sampled(lambda: replica.all_local(x), 0.1, most=20)})
    context.record(local, "computing", "ms", lambda s: s * 1e3, higher_is_better=False, parameters=parameters)
