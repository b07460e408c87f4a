"""The scaling run: what links, steps and start-up do as ranks are added, beside the simulator's prediction."""

from __future__ import annotations

from typing import Any

from .cases import CASES
from .harness import Case, Report
from .runner import run

_PEERS = ("cudaMemcpyAsync", "memcpy")
HOST_RANKS = 8

SCALE_CASES = (
    Case("scale_link", "raw transfers between every two ranks, and all at once", "every byte that landed", _PEERS),
    next(case for case in CASES if case.key == "incast"),
    Case("scale_start", "seconds until a group, a pool and a runtime are there, and the bytes they take",
         "every fetched tensor is compared with its owner's"),
    Case("scale_steps", "WaS in phase, staggered and at random; CaS with all replicas busy and with one; simulated",
         "every fetched tensor is compared with its owner's", ("all_local", "simulator"), deadline_s=180),
)  # fmt: skip


def worlds(most: int) -> list[int]:
    """2, 4, 8 ... and ``most``."""
    doubled = [1 << bit for bit in range(1, most.bit_length()) if 1 << bit <= most]
    return sorted({*doubled, most})


def scale(*, backend: str, ranks: int | None, num_gpus: int, **arguments: Any) -> Report:
    """Every case with 2, 4, ... ranks up to ``ranks``, by default one a GPU, or 8 on the host; else as ``run``."""
    most = ranks or (HOST_RANKS if backend == "host" else max(2, num_gpus))
    return run(backend=backend, table=SCALE_CASES, ranks=worlds(most), **arguments)
