"""Ops: token-wise functions of a layer, the unit of ``remote_compute``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, UnknownNameError
from .manifest import DTYPE_BYTES, LayerSpec, TensorSpec

if TYPE_CHECKING:
    import torch

OpFunction = Callable[[Mapping[str, "torch.Tensor"], "torch.Tensor"], Any]


@dataclass(frozen=True)
class Op:
    """Rows in, rows out: ``y = function(weights, x)`` with ``x`` of ``[rows, in_features]``.

    ``function`` returns one tensor of ``[rows, columns]`` or a tuple of them. It is captured once for each layer and
    then runs at the owner without Python, so it may use its weights and ``x`` alone, must be token-wise (row i of the
    result depends on row i of ``x``), and may not look at the number of rows. ``weights`` names, for each layer that
    has the op, the tensors that the function sees: ``{layer index: {short name: tensor name}}``.

    ``outputs``: columns and dtype of each result. Where they are given the function is not looked into on a GPU, so it
    may call kernels that only run there; it must do the same on all ranks, which compare ``kernel``, words for what
    computes it.
    """

    name: str
    function: OpFunction
    in_features: int
    dtype: str
    weights: Mapping[int, Mapping[str, str]]
    outputs: tuple[tuple[int, str], ...] = ()
    kernel: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"op {self.name!r}: dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
        if self.in_features < 1:
            raise ConfigError(f"op {self.name!r}: in_features is {self.in_features}, must be at least 1")
        if not self.weights:
            raise ConfigError(f"op {self.name!r} belongs to no layer")

    def specs(self, layers: Sequence[LayerSpec], layer: int) -> dict[str, TensorSpec]:
        """The tensors that the function sees for a layer, by short name."""
        if not 0 <= layer < len(layers):
            raise UnknownNameError(f"op {self.name!r} names layer {layer}; the pool has {len(layers)}", layer=layer)
        return {short: layers[layer].tensor(name) for short, name in self.weights[layer].items()}

    def layout(self, layers: Sequence[LayerSpec], layer: int) -> tuple[Any, ...]:
        """Of those tensors; layers with equal ones are alike to the function."""
        return tuple((short, s.shape, s.strides, s.dtype) for short, s in self.specs(layers, layer).items())


@dataclass(frozen=True)
class OpProgram:
    """A captured op, the same for all layers with tensors of the same shapes: what C++ runs.

    ``calls``: (operator, overload, arguments), each argument (kind, value, optional), kinds ``register`` (0 is x, then
    one a call), ``weight`` (index into ``weight_names``), ``int``, ``float``, ``bool``, ``none``.
    """

    weight_names: tuple[str, ...]
    calls: tuple[tuple[str, str, tuple[tuple[str, Any, bool], ...]], ...]
    outputs: tuple[int, ...]
    output_columns: tuple[int, ...]
    output_dtypes: tuple[str, ...]

    @property
    def out_row_bytes(self) -> int:
        columns = zip(self.output_columns, self.output_dtypes, strict=True)
        return sum(count * DTYPE_BYTES[dtype] for count, dtype in columns)


def buckets_of(max_rows: int, row_buckets: Sequence[int] | None) -> list[int]:
    """Row counts that owners compute, ascending: those given, or those of ``spread_rows``."""
    if row_buckets is not None:
        buckets = list(row_buckets)
        if not buckets or (max_rows and max_rows != buckets[-1]):
            raise ConfigError(f"row_buckets {buckets} must end in max_rows {max_rows}")
        return buckets
    return spread_rows(max_rows)


def spread_rows(max_rows: int) -> list[int]:
    """Powers of two up to 128, four to each doubling beyond, and ``max_rows`` itself.

    To round a request up costs little as long as a product's time is the reading of its weights: 64 layers of
    Qwen3-32B's linears on an H200 take 17 ms for a row, 20 for 128, 30 for 256 (planner/gpu_profiles.json). Each count
    is a graph to capture for each op, layer and requester.
    """
    beyond = (quarters << bit for bit in range(5, max_rows.bit_length()) for quarters in (5, 6, 7, 8))
    rows = [*(1 << bit for bit in range(8)), *beyond]
    return [count for count in rows if count < max_rows] + [max_rows]
