"""The pooled linears of a decoder layer: what they hold as built, and what vLLM makes of it after loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase

from ... import TensorSpec
from ..._torch import name_of
from ...errors import ConfigError, UnsupportedError
from . import compat

#: The pooled linears of a decoder layer: vLLM's merged ones, of Llama, Qwen2, Qwen3 and their like.
LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")

#: Of one decoder layer, by their names in it.
Linears = Mapping[str, Any]


def pooled_linears(block: nn.Module) -> dict[str, Any]:
    """The pooled linears by their name in the layer. ``UnsupportedError`` for a layer of another form."""
    found: dict[str, Any] = {}
    for name in LINEARS:
        try:
            linear: Any = block.get_submodule(name)
        except AttributeError:
            raise UnsupportedError(
                f"a {type(block).__name__} has no {name}; supported are dense models of the Llama and Qwen form"
            ) from None
        method = getattr(linear, "quant_method", None)
        if not isinstance(linear, LinearBase) or not isinstance(method, LinearMethodBase):
            raise UnsupportedError(
                f"{name} of {type(block).__name__} is a {type(linear).__name__} with {type(method).__name__}; pooled "
                "are vLLM's linears with a linear method"
            )
        if getattr(method, "uses_meta_device", False):
            raise UnsupportedError(
                f"{name} has {type(method).__name__}, which quantises while it loads: give a checkpoint that is fp8"
            )
        found[name] = linear
    return found


def tensors_of(linears: Linears) -> dict[str, torch.Tensor]:
    """Parameters and buffers by their name in the layer."""
    return {
        f"{name}.{short}": value
        for name, linear in linears.items()
        for group in (linear._parameters, linear._buffers)
        for short, value in group.items()
        if value is not None
    }


def specs_of(linears: Linears) -> tuple[TensorSpec, ...]:
    """What ``tensors_of`` gives, as a manifest has it. ``UnsupportedError`` for what a pool cannot hold."""
    try:
        return tuple(
            TensorSpec(name, tuple(value.shape), name_of(value.dtype), tuple(value.stride()))
            for name, value in tensors_of(linears).items()
        )
    except ConfigError as error:
        raise UnsupportedError(f"decoder layers have a tensor that a pool cannot hold: {error}") from error


def process(linears: Linears) -> None:
    """Has vLLM rewrite loaded weights for its kernels. ``UnsupportedError`` if some of them lie elsewhere then."""
    for name, linear in linears.items():
        linear.quant_method.process_weights_after_loading(linear)
        method, held = _describe(linear.quant_method), tensors_of({name: linear})
        if f"{name}.weight" not in held:
            raise UnsupportedError(f"{method} keeps the weights of {name} to itself, where a pool cannot reach them")
        inside = _tensors_in(linear)
        inside += [key for key, child in linear.named_children() if any(True for _ in child.state_dict())]
        for key, part in [("", linear.quant_method), *vars(linear.quant_method).items()]:
            inside += [f"its method's {f'{key}.{inner}'.lstrip('.')}" for inner in _tensors_in(part)]
        if inside:
            raise UnsupportedError(
                f"{method} puts {', '.join(inside)} beside the parameters of {name}: a layer that is streamed would "
                "not have it"
            )


def _tensors_in(holder: Any) -> list[str]:
    return [key for key, value in getattr(holder, "__dict__", {}).items() if isinstance(value, torch.Tensor)]


def choices_of(linears: Linears) -> dict[str, Any]:
    """Numbers and the like that building and processing left on the linears, by name."""
    return {
        f"{name}.{key}": value
        for name, linear in linears.items()
        for key, value in linear.__dict__.items()
        if _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, torch.dtype))


def stand_ins(linears: Linears, tensors: Mapping[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """The same linears on other ``tensors`` (by ``tensors_of``'s names) or their own; changes stay in the copies."""
    copies = {}
    for name, linear in linears.items():
        copy = object.__new__(type(linear))
        copy.__dict__.update(linear.__dict__)
        for group in ("_parameters", "_buffers"):
            own = linear.__dict__[group]
            copy.__dict__[group] = {
                short: value if value is None or tensors is None else tensors[f"{name}.{short}"]
                for short, value in own.items()
            }
        copies[name] = copy
    return copies


def apply(linear: Any, method: Any, x: torch.Tensor) -> torch.Tensor:
    """What the linear's forward computes: ``[rows, in_features]`` to ``[rows, out_features]``."""
    result: torch.Tensor = method.apply(linear, x, _bias(linear))
    return result


def product_of(linear: Any) -> Callable[..., torch.Tensor]:
    """The same by its method of now, as ``f(x, out=None)``: in ``out`` if given, without a copy where torch can."""
    method, can_put = linear.quant_method, compat.is_torchs_product(linear.quant_method)

    def product(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        if out is None:
            return apply(linear, method, x)
        if not can_put:
            return out.copy_(apply(linear, method, x))
        bias, weight = _bias(linear), linear.weight.t()
        return torch.mm(x, weight, out=out) if bias is None else torch.addmm(bias, x, weight, out=out)

    return product


def _bias(linear: Any) -> torch.Tensor | None:
    return None if linear.skip_bias_add else linear.bias


def kernels_of(linears: Linears) -> str:
    """Which methods with which kernels multiply: equal on ranks that compute the same."""
    return " ".join(f"{name} {_describe(linear.quant_method)}" for name, linear in linears.items())


def _describe(method: Any) -> str:
    parts = ", ".join(f"{key}={type(value).__name__}" for key, value in sorted(vars(method).items()))
    return f"{type(method).__name__}({parts})"


class ProcessedMethod:
    """Stands in for the method of a linear that was processed: vLLM processes those whose method is of its own kind."""

    def __init__(self, method: Any) -> None:
        self.method = method
