"""Set-up and steps inside a rank process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

import sidp_runtime as sidp
from helpers.models import SyntheticModel, mlp
from helpers.processes import RankContext
from sidp_runtime import Mode

#: Figures of no machine: tests never measure one.
PROFILE = sidp.MachineProfile(copy_bytes_per_s=1e10, round_trip_us=20.0, memory_bytes_per_s=1e10, flops_per_s=1e11)
MODES = {"was": Mode.WAS, "cas": Mode.CAS, "auto": None}


@dataclass
class Replica:
    """One rank of a synthetic model: its pool, runtime and the steps that tests run on them."""

    context: RankContext
    model: SyntheticModel
    group: sidp.Group
    pool: sidp.WeightPool
    runtime: sidp.Runtime

    @property
    def device(self) -> torch.device:
        return self.context.device(self.group.backend)

    @cached_property
    def reference(self) -> list[dict[str, torch.Tensor]]:
        layers = [self.model.weights(layer) for layer in range(self.model.num_layers)]
        # not .to(): it would drop the strides
        return [{k: torch.empty_like(t, device=self.device).copy_(t) for k, t in w.items()} for w in layers]

    def rows(self, count: int, seed: int = 0) -> torch.Tensor:
        return self.model.rows(count, seed).to(self.device)

    @property
    def streamed(self) -> list[int]:
        return self.pool.placement.streamed_layers(self.group.rank)

    def fetch(self, layer: int) -> dict[str, torch.Tensor]:
        """The layer by short name, in place: a fetch copies nothing beyond what the lane did."""
        tensors = self.runtime.fetch_layer(layer)
        assert tensors is self.runtime.views(layer)
        return self.model.short(layer, tensors)

    def assert_layer(self, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        for short, expected in self.reference[layer].items():
            assert tensors[short].stride() == expected.stride(), (layer, short)
            assert torch.equal(tensors[short], expected), f"layer {layer} {short}: other bytes"

    def step(self, *, rows: int = 3, seed: int = 0, between: Callable[[int], None] | None = None) -> str:
        """A checked forward pass in the step's mode: every layer's bytes, every result bit for bit. The mode."""
        x = expected = self.rows(rows, seed)
        with self.runtime.step(num_tokens=rows) as step:
            mode = step.mode
            for layer in range(self.model.num_layers):
                if self.pool.is_local(layer) or mode == Mode.WAS:
                    tensors = self.fetch(layer)
                    self.assert_layer(layer, tensors)
                    x = mlp(tensors, x)
                    self.runtime.release_layer(layer)
                else:
                    result = self.runtime.remote_compute(layer, "mlp", x)
                    assert isinstance(result, torch.Tensor)
                    x = result
                expected = mlp(self.reference[layer], expected)
                assert torch.equal(x, expected), f"layer {layer}: {(x - expected).abs().max()} off"
                if between is not None:
                    between(layer)
        return mode.name.lower()

    def settled_stats(self, copies: int, timeout_s: float = 20) -> dict[str, Any]:
        """Counters once the lane has made that many copies and then stayed quiet."""
        end = time.monotonic() + timeout_s
        while self.runtime.stats()["copies"] < copies and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.01)
        stats = self.runtime.stats()
        assert stats["copies"] == copies, f"{stats['copies']} copies, expected {copies}"
        return stats

    def bytes_by_peer(self, layers: Sequence[int]) -> list[int]:
        """What copying these layers adds to ``stats()["bytes_by_peer"]``."""
        moved = [0] * self.group.world_size
        for layer in layers:
            moved[self.pool.placement.owner(layer)] += self.pool.placement.layer_bytes(layer)
        return moved

    def head(self) -> list[int]:
        """The layers that the lane holds ready before a step."""
        return self.streamed[: self.pool.placement.num_slots(self.group.rank)]


@contextmanager
def open_replica(
    context: RankContext,
    model: SyntheticModel | None = None,
    *,
    mode: str = "auto",
    ring_slots: int = 2,
    resident_layers: Sequence[int] = (),
    ops: Sequence[str] = ("mlp",),
    max_rows: int = 16,
    deadline_ms: int | None = None,
    runtime_deadline_ms: int | None = None,
    backend: str = "host",
    profile: sidp.MachineProfile = PROFILE,
    group_arguments: Mapping[str, Any] | None = None,
    meet_at_end: bool = True,
    **runtime_arguments: Any,
) -> Iterator[Replica]:
    """A filled and published pool and its runtime, closed at the end, by default once all ranks got there."""
    model = model or SyntheticModel()
    with context.group(deadline_ms=deadline_ms, backend=backend, **(group_arguments or {})) as group:
        placement = model.placement(context.world_size, ring_slots=ring_slots, resident_layers=resident_layers)
        if backend != "host" and ops:
            runtime_arguments.setdefault("row_buckets", range(1, max_rows + 1))  # every count: results are bit-equal
        # a context on the other GPU takes a second where many processes start
        runtime_arguments.setdefault("owners_engines", mode != "cas")
        with sidp.WeightPool(group, model.layers(), placement) as pool:
            model.fill(pool)
            pool.publish()
            with sidp.Runtime(
                pool,
                policy=sidp.ModePolicy(profile, fixed=MODES[mode]),
                ops=model.ops(ops),
                max_rows=max_rows,
                deadline_ms=runtime_deadline_ms,
                **runtime_arguments,
            ) as runtime:
                yield Replica(context, model, group, pool, runtime)
                if meet_at_end:
                    context.meet("end")
