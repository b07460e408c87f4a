"""vLLM's offloader hook: it sees each decoder layer right after it was built, before the next one exists."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.offloader.base import BaseOffloader

from ... import LayerSpec, TensorSpec, WeightPool
from ...errors import UnsupportedError
from .linears import (
    LINEARS,
    Linears,
    ProcessedMethod,
    choices_of,
    pooled_linears,
    process,
    specs_of,
    stand_ins,
    tensors_of,
)

#: Makes the pool, given all of its layers. Collective.
MakePool = Callable[[Sequence[LayerSpec]], WeightPool]


class PoolOffloader(BaseOffloader):  # type: ignore[misc]
    """Puts the linears of each decoder layer on the pool, as vLLM leaves them after loading.

    As built they all lie in the memory of the first layer's, where ``fill`` loads and rewrites one layer after the
    other. The peak is what the rank owns, its ring and two layers. ``blocks``: the decoder layers; ``pool``: once
    ``fill`` has seen what a layer is rewritten to.
    """

    def __init__(self, num_layers: int) -> None:
        self.blocks: list[nn.Module] = []
        self.pool: WeightPool | None = None
        self._num_layers = num_layers
        self._built: tuple[TensorSpec, ...] = ()
        self._unset: dict[str, torch.Tensor] = {}  # all but the matrices, as they were built: loaders may look at that

    def wrap_modules(self, modules_generator: Generator[nn.Module, None, None], prefix: str = "") -> list[nn.Module]:
        """Called by vLLM's ``make_layers``."""
        if self.blocks:
            raise UnsupportedError("the model has a second stack of layers (an encoder or a tower); one can be pooled")
        shared: dict[str, torch.Tensor] = {}
        for index, block in enumerate(modules_generator):
            linears = pooled_linears(block)
            built = specs_of(linears)
            self._built = self._built or built
            if index >= self._num_layers or built != self._built:
                raise UnsupportedError(
                    f"decoder layer {index} with its {layer_spec(built, index).num_bytes} bytes is not like layer 0; "
                    "models whose layers differ are not supported",
                    layer=index,
                )
            if buffers := [f"{name}.{key}" for name, linear in linears.items() for key in linear._buffers]:
                raise UnsupportedError(f"{', '.join(buffers)} of a decoder layer are buffers, which no loader fills")
            for name, value in tensors_of(linears).items():
                value.data = shared.setdefault(name, value.data)
                if index == 0 and not name.endswith(".weight"):
                    self._unset[name] = value.data.clone()
            self.blocks.append(block)
        if len(self.blocks) != self._num_layers:
            raise UnsupportedError(
                f"the model built {len(self.blocks)} decoder layers, its config says {self._num_layers}",
                expected=self._num_layers,
                seen=len(self.blocks),
            )
        return list(self.blocks)

    def names_in(self, model: nn.Module) -> list[list[str]]:
        """Of each decoder layer, the pooled parameters as they were built, by their names in the model."""
        prefixes = {id(module): name for name, module in model.named_modules()}
        return [[f"{prefixes[id(block)]}.{tensor.name}" for tensor in self._built] for block in self.blocks]

    def fill(self, make_pool: MakePool, load: Callable[[int], None]) -> WeightPool:
        """Makes the pool and fills this rank's layers: ``load`` puts a layer's weights, as stored, into its linears.

        Afterwards all linears lie on the pool, and vLLM's post-processing passes them by until ``give_methods_back``.
        """
        layout = self._processed_layout()
        self.pool = pool = make_pool([layer_spec(layout, index) for index in range(self._num_layers)])
        choices: dict[str, Any] = {}
        for index, block in enumerate(self.blocks):
            linears = pooled_linears(block)
            if pool.is_local(index):
                held = tensors_of(linears)
                for name, value in self._unset.items():
                    held[name].data.copy_(value)
                load(index)
            else:
                _make_harmless(linears)
            process(linears)
            choices = choices or choices_of(linears)
            _check_like(index, linears, layout, choices)
            held = tensors_of(linears)
            for name, view in _places(pool, index).items():
                value = held[name]
                if pool.is_local(index):
                    view.copy_(value)
                value.data = view
            for linear in linears.values():
                linear.quant_method = ProcessedMethod(linear.quant_method)
        return pool

    def _processed_layout(self) -> tuple[TensorSpec, ...]:
        linears = pooled_linears(self.blocks[0])
        built = [(value, value.data) for value in tensors_of(linears).values()]
        copies = stand_ins(linears)
        _make_harmless(copies)
        process(copies)
        layout = specs_of(copies)
        for value, data in built:  # a method may also have changed what it was given
            value.data = data
        return layout

    def give_methods_back(self) -> None:
        """After vLLM's post-processing. ``UnsupportedError`` if something has moved off the pool meanwhile."""
        assert self.pool is not None
        for index, block in enumerate(self.blocks):
            linears: dict[str, Any] = {name: block.get_submodule(name) for name in LINEARS}
            for linear in linears.values():
                linear.quant_method = linear.quant_method.method
            held = tensors_of(linears)
            for name, view in _places(self.pool, index).items():
                value = held.get(name)
                if value is None or _where(value) != _where(view):
                    raise UnsupportedError(
                        f"vLLM replaced {name} of layer {index} while it finished loading: it no longer lies in the "
                        "pool",
                        layer=index,
                    )


def layer_spec(tensors: Sequence[TensorSpec], index: int) -> LayerSpec:
    """The layer as the pool holds it, under names that tell layers apart."""
    return LayerSpec(
        f"layers.{index}",
        tuple(TensorSpec(f"layers.{index}.{t.name}", t.shape, t.dtype, t.strides) for t in tensors),
    )


def _places(pool: WeightPool, index: int) -> dict[str, torch.Tensor]:
    """A layer's tensors, by their name in it, where its linears find them: its own memory, or its place in the ring."""
    views = pool.layer_view(index) if pool.is_local(index) else pool.ring_view(index)
    return {name.removeprefix(f"layers.{index}."): view for name, view in views.items()}


def _where(value: torch.Tensor) -> tuple[Any, ...]:
    return value.data_ptr(), value.dtype, value.shape, value.stride()


def _make_harmless(linears: Linears) -> None:
    """Of a layer that is not loaded here only the layout counts; vLLM rewrites any numbers, not any bits."""
    for value in tensors_of(linears).values():
        value.data.fill_(1)


def _check_like(index: int, linears: Linears, layout: tuple[TensorSpec, ...], choices: dict[str, Any]) -> None:
    """A layer that is not loaded here is held to be like the others, so what differs may not come from weights."""
    seen, chosen = set(specs_of(linears)), choices_of(linears)
    names = {t.name for t in seen.symmetric_difference(layout)}
    names |= {name for name in {*chosen, *choices} if chosen.get(name) != choices.get(name)}
    if names:
        raise UnsupportedError(
            f"after loading, {', '.join(sorted(names))} of decoder layer {index} is not as of every layer: a "
            "quantisation that decides by the weights cannot be pooled",
            layer=index,
        )
