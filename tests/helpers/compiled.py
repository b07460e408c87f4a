"""A forward pass for torch.compile, and what shows that it kept fetch, use and release in order."""

from __future__ import annotations

from collections.abc import Callable

import torch

from helpers.models import mlp
from helpers.ranks import Replica

Forward = Callable[[torch.Tensor], torch.Tensor]


def poison_on_release(replica: Replica) -> None:
    """From now on a released layer's bytes turn into NaN at once, so that a late use shows."""
    runtime = replica.runtime
    release = runtime.release_layer

    def poisoned(layer: int, *, stream: object = None) -> None:
        if not replica.pool.is_local(layer):
            for tensor in runtime.views(layer).values():
                tensor.fill_(float("nan"))
        release(layer, stream=stream)

    runtime.release_layer = poisoned  # type: ignore[method-assign]


def forward_of(replica: Replica, was: bool, late_use: bool = False) -> Forward:
    model, runtime, pool = replica.model, replica.runtime, replica.pool
    handle = runtime.handle
    views = [model.short(i, runtime.views(i)) for i in range(model.num_layers)]
    local = [pool.is_local(i) for i in range(model.num_layers)]

    def forward(x: torch.Tensor) -> torch.Tensor:
        for layer in range(model.num_layers):
            if not was and not local[layer]:
                (x,) = torch.ops.sidp.remote_compute(x, handle, layer, "mlp")
                continue
            x = x.clone()
            torch.ops.sidp.fetch_layer(x, handle, layer)
            y = x.clone() if late_use else mlp(views[layer], x)
            torch.ops.sidp.release_layer(y, handle, layer)
            x = mlp(views[layer], x) if late_use else y
        return x

    return forward
