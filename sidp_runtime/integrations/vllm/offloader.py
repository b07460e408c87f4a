"""vLLM's offloader hook: it sees each decoder layer right after it was built, before the next one exists."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.offloader.base import BaseOffloader

from ... import LayerSpec, TensorSpec, WeightPool
from ..._torch import name_of
from ...errors import UnsupportedError

#: The pooled linears of a decoder layer: vLLM's merged ones, of Llama, Qwen2, Qwen3 and their like.
LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")

#: Makes the pool, given all of its layers. Collective.
MakePool = Callable[[Sequence[LayerSpec]], WeightPool]


class PoolOffloader(BaseOffloader):  # type: ignore[misc]
    """Puts the linears of each decoder layer on the pool as soon as the layer is built.

    The layer's own memory goes back to the allocator, so the peak is what the rank owns, its ring and one layer.
    ``blocks``: the decoder layers; ``pool``: made when the first of them shows its shapes.
    """

    def __init__(self, num_layers: int, make_pool: MakePool) -> None:
        self.blocks: list[nn.Module] = []
        self.pool: WeightPool | None = None
        self._num_layers = num_layers
        self._make_pool = make_pool

    def wrap_modules(self, modules_generator: Generator[nn.Module, None, None], prefix: str = "") -> list[nn.Module]:
        """Called by vLLM's ``make_layers``."""
        if self.blocks:
            raise UnsupportedError("the model has a second stack of layers (an encoder or a tower); one can be pooled")
        for index, block in enumerate(modules_generator):
            tensors = linear_specs(block)
            spec = layer_spec(tensors, index)
            if self.pool is None:
                self.pool = self._make_pool([layer_spec(tensors, i) for i in range(self._num_layers)])
            if index >= self._num_layers or spec != self.pool.layers[index]:
                raise UnsupportedError(
                    f"decoder layer {index} with its {spec.num_bytes} bytes is not like layer 0; models whose layers "
                    "differ are not supported",
                    layer=index,
                )
            place_on_pool(block, index, self.pool)
            self.blocks.append(block)
        if len(self.blocks) != self._num_layers:
            raise UnsupportedError(
                f"the model built {len(self.blocks)} decoder layers, its config says {self._num_layers}",
                expected=self._num_layers,
                seen=len(self.blocks),
            )
        return list(self.blocks)


def pooled_parameters(block: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the pooled linears by their name in the layer. ``UnsupportedError`` for a layer of another form."""
    found: dict[str, nn.Parameter] = {}
    for name in LINEARS:
        try:
            linear: Any = block.get_submodule(name)
        except AttributeError:
            raise UnsupportedError(
                f"a {type(block).__name__} has no {name}; supported are dense models of the Llama and Qwen form"
            ) from None
        if not isinstance(linear, LinearBase) or type(linear.quant_method) is not UnquantizedLinearMethod:
            method = type(getattr(linear, "quant_method", None)).__name__
            raise UnsupportedError(
                f"{name} of {type(block).__name__} is a {type(linear).__name__} with {method}; linears that are "
                "quantised are not supported"
            )
        found.update((f"{name}.{short}", value) for short, value in linear.named_parameters())
    return found


def linear_specs(block: nn.Module) -> tuple[TensorSpec, ...]:
    """The pooled tensors of a layer, vLLM's merged ones, by their name in the layer."""
    return tuple(
        TensorSpec(name, tuple(value.shape), name_of(value.dtype), tuple(value.stride()))
        for name, value in pooled_parameters(block).items()
    )


def layer_spec(tensors: Sequence[TensorSpec], index: int) -> LayerSpec:
    """The layer as the pool holds it, under names that tell layers apart."""
    return LayerSpec(
        f"layers.{index}",
        tuple(TensorSpec(f"layers.{index}.{t.name}", t.shape, t.dtype, t.strides) for t in tensors),
    )


def place_on_pool(block: nn.Module, index: int, pool: WeightPool) -> None:
    """Points the parameters at the pool: at the rank's own layer, or at the layer's fixed place in the ring."""
    views = pool.layer_view(index) if pool.is_local(index) else pool.ring_view(index)
    for name, value in pooled_parameters(block).items():
        value.data = views[f"layers.{index}.{name}"]


def check_places(blocks: Sequence[nn.Module], pool: WeightPool) -> None:
    """After loading: nothing that vLLM did since has moved a parameter off the pool."""
    for index, block in enumerate(blocks):
        views = pool.layer_view(index) if pool.is_local(index) else pool.ring_view(index)
        for name, value in pooled_parameters(block).items():
            view: torch.Tensor = views[f"layers.{index}.{name}"]
            if value.data_ptr() != view.data_ptr() or value.shape != view.shape or value.stride() != view.stride():
                raise UnsupportedError(
                    f"vLLM replaced {name} of layer {index} while it finished loading: it no longer lies in the pool",
                    layer=index,
                )
