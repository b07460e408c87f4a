"""A ring filled inside each step, ordered by events: how weight offloaders prefetch (vLLM's prefetch backend)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from sidp_runtime import _C, _torch

from .layers import Replica, block, next_rows

SLOTS = 2


@dataclass
class EventRing:
    """Copies of the streamed layers begin when the step does and stay ``SLOTS`` ahead. On the host they wait."""

    replica: Replica
    source: Callable[[int], torch.Tensor]  # bytes of a streamed layer
    slots: list[torch.Tensor] = field(default_factory=list)
    lane: Any = None

    def __post_init__(self) -> None:
        device = self.replica.context.device
        self.slots = [torch.empty(self.replica.layer_bytes, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._views = [_views(self.replica, slot) for slot in self.slots]
        if self.replica.context.on_gpu:
            self.lane = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @classmethod
    def from_pinned(cls, replica: Replica) -> EventRing:
        """One layer's bytes in pinned host memory stand for all streamed ones: the traffic is the same."""
        host = torch.empty(replica.layer_bytes, dtype=torch.uint8, pin_memory=replica.context.on_gpu)
        host.copy_(from_dlpack(replica.pool.core.local_layer(replica.pool.local_layers[0])))
        return cls(replica, lambda _: host)

    @classmethod
    def from_peers(cls, replica: Replica) -> EventRing:
        """The owners' bytes over the link."""
        core = replica.pool.core
        return cls(replica, lambda layer: from_dlpack(_C.peer_layer(core, layer)))

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """One forward pass."""
        replica, streamed = self.replica, self.replica.streamed
        current = torch.cuda.current_stream() if self.lane is not None else None
        ready: list[Any] = []

        def fetch(k: int) -> None:
            slot, source = self.slots[k % SLOTS], self.source(streamed[k])
            if self.lane is None:
                slot.copy_(source)
                return
            self.lane.wait_stream(current)
            with torch.cuda.stream(self.lane):
                slot.copy_(source, non_blocking=True)
                ready.append(self.lane.record_event())

        fetched = 0
        for _ in range(min(SLOTS, len(streamed))):
            fetch(fetched)
            fetched += 1
        used = 0
        for layer in range(replica.shape.layers):
            if replica.pool.is_local(layer):
                weights = replica.pool.layer_view(layer)
            else:
                if current is not None:
                    current.wait_event(ready[used])
                weights = self._views[used % SLOTS]
            x = next_rows(replica.shape, *block(weights, x))
            if not replica.pool.is_local(layer):
                used += 1
                if fetched < len(streamed):
                    fetch(fetched)
                    fetched += 1
        return x


def _views(replica: Replica, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """A layer's tensors inside its bytes."""
    layer, views = replica.pool.layers[0], {}
    for spec in layer.tensors:
        start = layer.offsets[spec.name]
        elements = flat[start : start + spec.num_bytes].view(_torch.dtype_of(spec.dtype))
        views[spec.name] = elements.view(spec.shape)
    return views
