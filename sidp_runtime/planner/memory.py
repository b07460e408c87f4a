"""Bytes of a device by item, for plain DP, TP and SiDP; they add up to the device's memory.

Owned, resident and ring bytes come from ``Placement.by_layer``, the same pure function that the runtime places with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from ..errors import ConfigError
from ..manifest import ALIGNMENT, align_up
from ..placement import Placement, choose_resident_layers
from .model_shape import ModelShape
from .step_time import Streamed

#: NVSHMEM maps its symmetric heap in units of this; every rank allocates as much as the one that needs most.
HEAP_UNIT_BYTES = 512 << 20


@dataclass(frozen=True)
class MemorySettings:
    """What is not weights. Defaults are assumptions for most shapes, measured on H200.

    ``utilization``: share of the device that the engine may use. ``context_bytes``: CUDA context and loaded kernels.
    ``peer_context_bytes``: of each peer, whose process has a context here for its copies; without CaS alone, as engines
    that compute in CaS load all kernels early and then read layers themselves (``owners_engines``).
    ``workspace_bytes``: activations, logits and library workspaces at the largest step (``activation_bytes`` gives the
    part that follows from the shape). ``block_tokens``: KV is handed out in blocks of so many tokens a layer.
    ``max_rows``: rows of the largest CaS step; 0: no CaS. ``ring_slots``: layers that a ring holds.
    """

    utilization: float = 0.90
    context_bytes: int = 512 << 20
    peer_context_bytes: int = 276 << 20
    workspace_bytes: int = 7 << 28
    block_tokens: int = 16
    max_rows: int = 512
    ring_slots: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.utilization <= 1:
            raise ConfigError(f"utilization is {self.utilization}, must be above 0 and at most 1")
        for name in ("context_bytes", "peer_context_bytes", "workspace_bytes", "max_rows"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be at least 0")
        for name in ("block_tokens", "ring_slots"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be at least 1")


@dataclass(frozen=True)
class KvCache:
    """KV of one device: its share of ``num_kv_heads`` in blocks, up to ``context`` tokens a sequence."""

    shape: ModelShape
    context: int
    block_tokens: int
    tensor_parallel: int = 1

    @cached_property
    def layer_token_bytes(self) -> int:
        # Fewer KV heads than devices are replicated.
        return (
            self.shape.kv_layer_bytes // self.shape.num_kv_heads * -(-self.shape.num_kv_heads // self.tensor_parallel)
        )

    def sequence_bytes(self, tokens: int) -> int:
        """Bytes of one sequence of ``tokens`` tokens; a layer with a window keeps no more than that."""
        kept = (tokens if w is None else min(tokens, w) for w in self.shape.windows)
        return self.layer_token_bytes * sum(align_up(n, self.block_tokens) for n in kept)

    def fill(self, num_bytes: int) -> tuple[int, int, int]:
        """(sequences of ``context`` tokens, tokens of these and of one shorter one, bytes used)."""
        whole = self.sequence_bytes(self.context)
        sequences, rest = divmod(max(num_bytes, 0), whole)
        low, high = 0, self.context
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.sequence_bytes(middle) <= rest else (low, middle - 1)
        return sequences, sequences * self.context + low, sequences * whole + self.sequence_bytes(low)


@lru_cache(maxsize=8)
def sequence_bytes_by_tokens(kv: KvCache) -> list[int]:
    """Of sequences of 0, 1, ... ``kv.context`` tokens."""
    size = kv.block_tokens
    blocks = [kv.sequence_bytes(tokens) for tokens in range(0, kv.context + size, size)]
    return [blocks[-(-tokens // size)] for tokens in range(kv.context + 1)]


@dataclass(frozen=True)
class DeviceMemory:
    """One device. ``items`` add up to ``device_bytes + shortfall_bytes``; nothing fits while the latter is above 0."""

    device_bytes: int
    items: dict[str, int]
    kv_tokens: int
    sequences: int
    shortfall_bytes: int

    @property
    def fits(self) -> bool:
        return self.shortfall_bytes == 0

    @property
    def kv_room_bytes(self) -> int:
        """For KV, of sequences of any length."""
        return self.items["KV cache"] + self.items["unused"]


def activation_bytes(shape: ModelShape, step_tokens: int, sampled: int) -> int:
    """Live at once in the MLP of a step: residual and input, gate, up and their product; besides logits in float32."""
    rows = step_tokens * shape.element_bytes * (2 * shape.hidden + 3 * shape.intermediate)
    return max(rows, 4 * sampled * shape.vocab)


@lru_cache(maxsize=8)
def _layer_sizes(shape: ModelShape, mlp_only: bool) -> tuple[int, ...]:
    return tuple(layer.num_bytes for layer in shape.layer_specs(mlp_only=mlp_only))


def place(
    shape: ModelShape, world_size: int, num_resident: int, settings: MemorySettings, *, mlp_only: bool = False
) -> Placement:
    """The placement with ``num_resident`` resident layers at even distances: of layers all alike any will do."""
    if not 0 <= num_resident <= shape.num_layers:
        raise ConfigError(f"{num_resident} resident layers: must be 0 to {shape.num_layers}")
    return Placement.by_layer(
        _layer_sizes(shape, mlp_only),
        world_size,
        ring_slots=settings.ring_slots,
        resident_layers=choose_resident_layers(shape.num_layers, num_resident, world_size, cas=False),
    )


def streamed(placement: Placement) -> Streamed:
    """Of the rank that streams most."""
    ranks = (placement.streamed_layers(rank) for rank in range(placement.world_size))
    return max(
        (
            Streamed(len(layers), sum(placement.layer_bytes(layer) for layer in layers), placement.resident_bytes)
            for layers in ranks
        ),
        key=lambda s: s.num_bytes,
    )


def mailbox_bytes(shape: ModelShape, world_size: int, max_rows: int) -> int:
    """Request and reply slots of a rank, one pair for each peer (``csrc/core/activation_channel.cpp``)."""
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    widest = max(shape.hidden, q), max(q + 2 * kv, shape.hidden)
    slots = (ALIGNMENT + align_up(max_rows * shape.element_bytes * width) for width in widest)
    return world_size * sum(slots)


def plain(
    shape: ModelShape, device_bytes: int, context: int, settings: MemorySettings, tensor_parallel: int = 1
) -> DeviceMemory:
    """A device of plain DP, or of a TP group: everything that has a head, row or column is split, norms are not.

    Where there are fewer KV heads than devices, each device has a whole one, and its two projections.
    """
    head_bytes = shape.num_layers * 2 * shape.head_dim * shape.hidden * shape.element_bytes
    repeated = head_bytes * max(0, tensor_parallel - shape.num_kv_heads)
    items = {"layers": -(-(shape.linear_bytes + repeated) // tensor_parallel)}
    kv = KvCache(shape, context, settings.block_tokens, tensor_parallel)
    return _device(shape, device_bytes, items, kv, settings)


def shared(
    shape: ModelShape,
    device_bytes: int,
    context: int,
    settings: MemorySettings,
    placement: Placement,
    *,
    mlp_only: bool = False,
) -> DeviceMemory:
    """A device of a SiDP group: the rank that owns most, with its ring."""
    ranks = range(placement.world_size)
    owned = max(placement.pool_bytes(rank) for rank in ranks)
    mailbox = mailbox_bytes(shape, placement.world_size, settings.max_rows) if settings.max_rows else 0
    heap = [owned, mailbox, 1]  # flags take a unit of their own
    outside = shape.num_layers * (shape.layer_params - shape.mlp_params) * shape.element_bytes if mlp_only else 0
    items = {
        "attention outside the pool": outside,
        "owned layers": owned,
        "resident layers": placement.resident_bytes,
        "ring": max(placement.ring_bytes(rank) for rank in ranks),
        "CaS mailbox": mailbox,
        "peers' CUDA contexts": 0 if mailbox else settings.peer_context_bytes * (placement.world_size - 1),
        "flags and rounding to 512 MiB": sum(align_up(n, HEAP_UNIT_BYTES) for n in heap) - owned - mailbox,
    }
    return _device(shape, device_bytes, items, KvCache(shape, context, settings.block_tokens), settings)


def _device(
    shape: ModelShape, device_bytes: int, layers: dict[str, int], kv: KvCache, settings: MemorySettings
) -> DeviceMemory:
    split, size = kv.tensor_parallel, shape.element_bytes
    usable = int(device_bytes * settings.utilization)
    items = {
        "kept free (1 - utilization)": device_bytes - usable,
        "CUDA context": settings.context_bytes,
        "workspace": settings.workspace_bytes,
        **layers,
        "norms": shape.norm_params * size,
        "embedding": -(-shape.embedding_params * size // split),
        "head": -(-shape.head_params * size // split),
    }
    room = device_bytes - sum(items.values())
    sequences, tokens, used = kv.fill(room)
    items |= {"KV cache": used, "unused": max(room - used, 0)}
    return DeviceMemory(device_bytes, items, tokens, sequences, max(-room, 0))


def non_zero(rows: Sequence[DeviceMemory]) -> list[str]:
    """Names of the items that any of the devices has, in order."""
    names = dict.fromkeys(name for row in rows for name in row.items)
    last = ["norms", "embedding", "head", "KV cache", "unused"]
    ordered = [name for name in names if name not in last] + last
    return [name for name in ordered if any(row.items.get(name) for row in rows)]
