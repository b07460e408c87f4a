"""What a pool holds: named tensors grouped into layers, and their byte layout."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .errors import ConfigError, UnknownNameError

#: Alignment in bytes of each tensor inside a layer and of each layer inside a pool: a cache line pair on
#: the host, a full sector burst of a GPU's copy engine.
ALIGNMENT = 256

#: Bytes of an element, by dtype name. Names are torch's, without the ``torch.`` prefix.
DTYPE_BYTES: dict[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


def align_up(value: int, alignment: int = ALIGNMENT) -> int:
    """``value`` rounded up to a multiple of ``alignment`` (both in bytes)."""
    return -(-value // alignment) * alignment


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides, in elements."""
    strides: list[int] = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a layer.

    ``dtype`` is a key of ``DTYPE_BYTES``; ``strides`` are in elements and default to row-major. Strided
    tensors must be dense: a permutation of a row-major layout, so that bytes and elements agree.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(extent) for extent in self.shape))
        strides = tuple(int(s) for s in self.strides) or contiguous_strides(self.shape)
        object.__setattr__(self, "strides", strides)
        if not self.name or any(c.isspace() for c in self.name):
            raise ConfigError(f"tensor name {self.name!r} is empty or has white space")
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"tensor {self.name!r}: dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
        if any(extent <= 0 for extent in self.shape):
            raise ConfigError(f"tensor {self.name!r}: shape {self.shape} has an extent below 1")
        if any(stride < 0 for stride in strides):
            raise ConfigError(f"tensor {self.name!r}: strides {strides} are not dense: they must not be negative")
        dense = sorted(zip(strides, self.shape, strict=False), key=lambda pair: pair[0])
        step = 1
        for stride, extent in dense:
            if extent != 1 and stride != step:
                raise ConfigError(f"tensor {self.name!r}: strides {strides} of shape {self.shape} are not dense")
            step *= extent
        if len(strides) != len(self.shape):
            raise ConfigError(f"tensor {self.name!r}: {len(strides)} strides for {len(self.shape)} dimensions")

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class LayerSpec:
    """The unit of the pool: named tensors that move together.

    Tensors lie in the order given, each aligned to ``ALIGNMENT``; ``offsets`` are bytes from the layer's start.
    """

    name: str
    tensors: tuple[TensorSpec, ...]
    offsets: dict[str, int] = field(init=False, compare=False, repr=False)
    num_bytes: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", tuple(self.tensors))
        if not self.tensors:
            raise ConfigError(f"layer {self.name!r} has no tensors")
        offsets: dict[str, int] = {}
        end = 0
        for tensor in self.tensors:
            if tensor.name in offsets:
                raise ConfigError(f"layer {self.name!r} names tensor {tensor.name!r} twice")
            offsets[tensor.name] = end
            end = align_up(end + tensor.num_bytes)
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "num_bytes", end)

    def tensor(self, name: str) -> TensorSpec:
        """The tensor of that name, or ``UnknownNameError``."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise UnknownNameError(f"layer {self.name!r} has no tensor {name!r}; it has {', '.join(self.offsets)}")


def manifest_text(layers: Iterable[LayerSpec]) -> str:
    """Canonical text of the layers, one line a tensor; ranks compare it before anything is allocated."""
    lines = []
    for index, layer in enumerate(layers):
        for t in layer.tensors:
            lines.append(
                f"layer {index} {layer.name} tensor {t.name} shape {list(t.shape)} "
                f"strides {list(t.strides)} dtype {t.dtype} offset {layer.offsets[t.name]}"
            )
    return "\n".join(lines)


def manifest_digest(layers: Iterable[LayerSpec]) -> str:
    """SHA-256 of ``manifest_text``, in hex."""
    return hashlib.sha256(manifest_text(layers).encode()).hexdigest()
