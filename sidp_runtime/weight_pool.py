"""WeightPool: one copy of the layers in a group of replicas."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from . import _C, _torch, memory
from .errors import ClosedError, ConfigError, UnsupportedError, UsageError
from .group import Group
from .loading import CheckpointSource, LoadReport, Progress, load_layers, load_layers_staged
from .manifest import LayerSpec, manifest_text
from .placement import Placement

if TYPE_CHECKING:
    import torch

    from .runtime import Runtime


class WeightPool:
    """Each layer's bytes lie once in the group, at its owner, or on every rank if it is resident.

    Constructing is collective: versions, manifests and placements are compared on all ranks before anything is
    allocated (``ManifestMismatchError`` names the first difference), and if one rank cannot allocate, all raise
    ``CapacityError`` and keep nothing. Fill the local layers (``load`` or ``layer_view`` and ``publish``), then give
    the pool to a ``Runtime``.
    """

    def __init__(self, group: Group, layers: Sequence[LayerSpec], placement: Placement) -> None:
        self.group = group
        self.layers = tuple(layers)
        self.placement = placement
        if placement.num_layers != len(self.layers):
            raise ConfigError(f"the placement has {placement.num_layers} layers, {len(self.layers)} were given")
        for index, layer in enumerate(self.layers):
            if placement.layer_bytes(index) != layer.num_bytes:
                raise ConfigError(
                    f"layer {index} ({layer.name}) has {layer.num_bytes} bytes, the placement says "
                    f"{placement.layer_bytes(index)}",
                    layer=index,
                    num_bytes=layer.num_bytes,
                )
        self.backend = group.make_backend()
        # another version of either may lay out or compute differently
        manifest = f"{_torch.versions()}\n{manifest_text(self.layers)}"
        self._runtime: weakref.ref[Runtime] | None = None
        free = self._device_free()
        self._pool: _C.WeightPool | None = _C.WeightPool(self.backend, placement, manifest)
        self._device_bytes = free - self._device_free()

    @property
    def core(self) -> _C.WeightPool:
        """The C++ pool; ``ClosedError`` after ``close``."""
        if self._pool is None:
            raise ClosedError("the weight pool is closed", rank=self.group.rank)
        return self._pool

    @property
    def local_layers(self) -> list[int]:
        """Indices of the layers that this rank holds: its own and the resident ones."""
        return [i for i in range(len(self.layers)) if self.is_local(i)]

    @property
    def pooled_bytes(self) -> int:
        """Bytes of all layers together: what a full replica would hold."""
        return sum(layer.num_bytes for layer in self.layers)

    @property
    def held_bytes(self) -> int:
        """Bytes of layers and ring that this rank holds, computed (``memory_report`` measures)."""
        rank, placement = self.group.rank, self.placement
        return placement.pool_bytes(rank) + placement.resident_bytes + placement.ring_bytes(rank)

    def is_local(self, layer: int) -> bool:
        """Whether this rank holds the layer outside its ring. ``UnknownNameError`` for a layer out of range."""
        return self.placement.is_local(self.group.rank, layer)

    def layer_view(self, layer: int) -> dict[str, torch.Tensor]:
        """Tensors of a local layer by name, in place. Write them before ``publish`` only."""
        return _torch.tensor_views(self.core.local_layer(layer), self.layers[layer])

    def buffer(self, layer: int) -> memoryview:
        """The bytes of a local layer, writable, tensors at ``layers[layer].offsets``. Write before ``publish`` only.

        ``UnsupportedError`` on a GPU: write through ``layer_view``.
        """
        view = self.core.local_layer(layer)
        if self.group.device is not None:
            raise UnsupportedError(f"layer {layer} lies on device {self.group.device}; write through layer_view()")
        return _torch.writable_bytes(view)

    def load(self, source: CheckpointSource, progress: Progress | None = None) -> LoadReport:
        """Reads this rank's layers and nothing else from a checkpoint, then publishes. Collective.

        Peak memory: the rank's layers, its ring, and one tensor where the file's dtype differs from the pool's; on a
        GPU also the largest layer, on the host.
        """
        local = self.local_layers
        if self.group.device is not None:
            report = load_layers_staged(
                source,
                {i: self.layers[i] for i in local},
                lambda i, staged: _torch.copy_bytes(self.core.local_layer(i), staged),
                progress,
            )
            self.publish()
            return report
        report = load_layers(
            source, [self.layers[i] for i in local], dict(enumerate(self.buffer(i) for i in local)), progress
        )
        self.publish()
        return report

    def publish(self) -> None:
        """This rank's layers are final; returns when those of all ranks are. Collective."""
        if self.group.device is not None:
            from . import _torch_gpu

            _torch_gpu.synchronize(self.group.device)  # what torch still writes there must not be read half done
        self.core.publish()

    def ring_view(self, layer: int) -> dict[str, torch.Tensor]:
        """Tensors of a streamed layer at its fixed ring address; valid from ``fetch_layer`` to ``release_layer``.

        ``UsageError`` for a layer that is not streamed to this rank.
        """
        entry = next((e for e in self.placement.ring_plan(self.group.rank) if e.layer == layer), None)
        if entry is None:
            raise UsageError(f"layer {layer} is not streamed to rank {self.group.rank}", layer=layer)
        return _torch.tensor_views(self.core.ring_view(entry.offset, entry.bytes), self.layers[layer])

    def memory_report(self) -> dict[str, int]:
        """Bytes of this process as the kernel counts them: see ``sidp_runtime.memory.report``.

        On a GPU also ``device_bytes``: by how much the device's free memory fell when the pool was made. Where ranks
        share a device, that is what the pools of all of them took.
        """
        found = memory.report(self.group.token)
        if self.group.device is not None:
            found["device_bytes"] = self._device_bytes
        return found

    def _device_free(self) -> int:
        if self.group.device is None:
            return 0
        from . import _torch_gpu

        return _torch_gpu.free_bytes(self.group.device)

    def close(self) -> None:
        """Lets go of the memory. Idempotent.

        On the host, tensors made of it stay valid and peers keep what they have mapped. On a GPU closing is
        collective, because NVSHMEM frees on all ranks at once, and tensors of the pool are void afterwards, so the
        runtime that uses it is closed first. If a rank died or does not come within the group's deadline, the memory
        stays until the process ends and a ``ResourceWarning`` says so.
        """
        runtime = self._runtime() if self._runtime is not None else None
        if self._pool is not None and self.group.device is not None and runtime is not None:
            runtime.close()
        pool, self._pool = self._pool, None
        if pool is not None and not pool.close_backend():
            warnings.warn(
                f"rank {self.group.rank}: not every rank came to close the pool, so its memory on device "
                f"{self.group.device} stays allocated until this process ends",
                ResourceWarning,
                stacklevel=2,
            )

    def __enter__(self) -> WeightPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
