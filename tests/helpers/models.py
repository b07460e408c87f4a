"""Synthetic layers. A weight is a pure function of its layer and name, so that a wrong layer's bytes show."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

import sidp_runtime as sidp
from sidp_runtime import LayerSpec, Op, TensorSpec
from sidp_runtime._torch import dtype_of

Weights = Mapping[str, torch.Tensor]


def mlp(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """A gated MLP with a bias: [rows, hidden] to [rows, hidden]."""
    return functional.linear(
        functional.silu(functional.linear(x, w["gate"])) * functional.linear(x, w["up"]), w["down"], w["bias"]
    )


def pair(w: Weights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two outputs: [rows, hidden] to [rows, 8] and [rows, 24]."""
    return functional.linear(x, w["left"]), functional.linear(x, w["right"])


@dataclass(frozen=True)
class SyntheticModel:
    """Layers of unequal sizes; ``down`` is stored column-major, so strides matter."""

    num_layers: int = 5
    hidden: int = 16
    dtype: str = "float32"
    inner: int = 8  # columns of the smallest layer's MLP
    uneven: bool = True

    def _inner(self, layer: int) -> int:
        return self.inner * (2 if self.uneven and layer % 3 == 1 else 1)

    def specs(self, layer: int) -> dict[str, TensorSpec]:
        """The layer's tensors by short name."""
        h, n = self.hidden, self._inner(layer)

        def spec(short: str, *shape: int, strides: tuple[int, ...] = ()) -> TensorSpec:
            return TensorSpec(f"layers.{layer}.{short}", shape, self.dtype, strides)

        return {
            "gate": spec("gate", n, h),
            "up": spec("up", n, h),
            "down": spec("down", h, n, strides=(1, h)),
            "bias": spec("bias", h),
            "left": spec("left", 8, h),
            "right": spec("right", 24, h),
        }

    def layers(self) -> list[LayerSpec]:
        return [LayerSpec(f"layers.{i}", tuple(self.specs(i).values())) for i in range(self.num_layers)]

    def weights(self, layer: int) -> dict[str, torch.Tensor]:
        """The layer's tensors by short name, on the heap, with the pool's strides."""
        made = {}
        for short, spec in self.specs(layer).items():
            generator = torch.Generator().manual_seed(zlib.crc32(spec.name.encode()))
            values = torch.randn(spec.shape, generator=generator) / spec.shape[-1] ** 0.5
            target = torch.empty_strided(spec.shape, spec.strides, dtype=dtype_of(self.dtype))
            made[short] = target.copy_(values)
        return made

    def names(self, layer: int) -> dict[str, str]:
        return {short: spec.name for short, spec in self.specs(layer).items()}

    def short(self, layer: int, tensors: Weights) -> dict[str, torch.Tensor]:
        """A fetched layer by short name."""
        return {short: tensors[name] for short, name in self.names(layer).items()}

    def ops(self, names: Sequence[str] = ("mlp",)) -> list[Op]:
        """The ops of these names, of every layer; capturing one costs tens of milliseconds."""
        functions = {"mlp": mlp, "pair": pair}
        every = {i: self.names(i) for i in range(self.num_layers)}
        return [Op(name, functions[name], self.hidden, self.dtype, every) for name in names]

    def placement(self, world_size: int, *, ring_slots: int = 2, resident_layers: Sequence[int] = ()) -> sidp.Placement:
        sizes = [layer.num_bytes for layer in self.layers()]
        return sidp.Placement.by_layer(sizes, world_size, ring_slots=ring_slots, resident_layers=list(resident_layers))

    def fill(self, pool: sidp.WeightPool) -> None:
        """Writes this rank's layers."""
        for layer in pool.local_layers:
            view = self.short(layer, pool.layer_view(layer))
            for short, tensor in self.weights(layer).items():
                view[short].copy_(tensor)

    def rows(self, count: int, seed: int = 0) -> torch.Tensor:
        """[count, hidden] of the model's dtype."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, self.hidden, generator=generator).to(dtype_of(self.dtype))

    def forward(self, x: torch.Tensor, layer_of: Callable[[int], Weights] | None = None) -> torch.Tensor:
        """All layers one after the other; without ``layer_of`` on the heap's weights: the reference."""
        for layer in range(self.num_layers):
            x = mlp((layer_of or self.weights)(layer), x)
        return x


def max_abs_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max())
