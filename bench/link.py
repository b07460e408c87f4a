"""Bytes of one rank that the others read: on GPUs a pool's symmetric memory, on the host a mapped file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.dlpack import from_dlpack

from sidp_runtime import _C, LayerSpec, Placement, TensorSpec, WeightPool

from .rank import RankContext, WrongDataError


@dataclass
class Link:
    """``own``: this rank's bytes; ``remote[r]``: those of rank r as mapped here; ``landing``: local, twice as many.

    ``remote_landing[r]``: on GPUs, as many bytes of rank r for others to write.
    """

    context: RankContext
    own: torch.Tensor
    remote: dict[int, torch.Tensor]
    landing: torch.Tensor
    remote_landing: dict[int, torch.Tensor]

    def expected(self, owner: int, num_bytes: int) -> torch.Tensor:
        """What rank ``owner`` holds."""
        words = torch.arange(num_bytes // 8, dtype=torch.int64, device=self.own.device)
        return words.mul_(2654435761).add_(owner + 1).view(torch.uint8)

    def verify(self, owner: int, num_bytes: int, offset: int = 0) -> None:
        """``WrongDataError`` unless the landing holds the owner's bytes; then it is cleared for the next subject."""
        self.context.synchronize()
        self.verify_landed(self.landing[offset : offset + num_bytes], owner)

    def verify_landed(self, landed: torch.Tensor, owner: int) -> None:
        num_bytes = landed.numel()
        right = torch.equal(landed, self.expected(owner, num_bytes))
        landed.zero_()
        self.context.synchronize()
        if not right:
            raise WrongDataError(f"{num_bytes} bytes of rank {owner} did not arrive as they are there")


@contextmanager
def open_link(context: RankContext, num_bytes: int) -> Iterator[Link]:
    """Collective. ``num_bytes``: of each rank, a multiple of 8."""
    landing = torch.zeros(2 * num_bytes, dtype=torch.uint8, device=context.device)
    if not context.on_gpu:
        own, remote = _map_files(context, num_bytes)
        link = Link(context, own, remote, landing, {})
        own.copy_(link.expected(context.rank, num_bytes))
        context.meet()
        yield link
        context.meet()
        return
    world = context.world_size
    bytes_of_one = (TensorSpec("bytes", (num_bytes,), "uint8"),)
    layers = [LayerSpec(f"rank{r}.{what}", bytes_of_one) for what in ("own", "landing") for r in range(world)]
    placement = Placement.by_layer([layer.num_bytes for layer in layers], context.world_size, ring_slots=1)
    with WeightPool(context.group, layers, placement) as pool:
        own = pool.layer_view(context.rank)["bytes"]
        owned = [pool.placement.owner(layer) for layer in range(2 * world)]
        assert owned == [*range(world), *range(world)], owned
        others = [r for r in range(world) if r != context.rank]
        remote = {r: from_dlpack(_C.peer_layer(pool.core, r)) for r in others}
        landings = {r: from_dlpack(_C.peer_layer(pool.core, world + r)) for r in others}
        link = Link(context, own, remote, landing, landings)
        own.copy_(link.expected(context.rank, num_bytes))
        pool.publish()
        yield link
        context.synchronize()
        context.meet()


def _map_files(context: RankContext, num_bytes: int) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    names = [f"/dev/shm/sidp-bench-{context.token}-{rank}" for rank in range(context.world_size)]
    try:
        own = torch.from_file(names[context.rank], shared=True, size=num_bytes, dtype=torch.uint8)
        context.meet()
        remote = {
            rank: torch.from_file(name, shared=True, size=num_bytes, dtype=torch.uint8)
            for rank, name in enumerate(names)
            if rank != context.rank
        }
        context.meet()
    finally:
        Path(names[context.rank]).unlink(missing_ok=True)
    return own, remote
