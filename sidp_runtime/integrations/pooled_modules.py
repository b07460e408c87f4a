"""Modules that stand in for a model's linears, embedding and head, and the state of the step they are in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .. import Mode, Runtime


class StepState:
    """The mode of the step in progress, and what a layer does before and after its use."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.mode = Mode.WAS
        self._local = [runtime.pool.is_local(layer) for layer in range(len(runtime.pool.layers))]

    @property
    def is_cas(self) -> bool:
        return self.mode == Mode.CAS

    def wrap_forward(self, model: Any) -> None:
        """Makes each forward of the model a step; its signature stays, because ``generate`` looks at it."""
        forward = model.forward

        @functools.wraps(forward)
        def step_forward(*args: Any, **kwargs: Any) -> Any:
            tokens = kwargs.get("input_ids", args[0] if args else None)
            if tokens is None:
                tokens = kwargs["inputs_embeds"][..., 0]
            with self.runtime.step(num_tokens=tokens.numel()) as step:
                self.mode = step.mode
                return forward(*args, **kwargs)

        model.forward = step_forward

    # Streamed layers of WaS steps, and local ones of CaS steps: there it takes turns with what peers ask of its GPU.
    def before_layer(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.is_cas == self._local[layer]:
            self.fetch(args[0], layer)

    def after_layer(self, layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.is_cas == self._local[layer]:
            self.release(output if isinstance(output, torch.Tensor) else output[0], layer)

    def fetch(self, x: torch.Tensor, layer: int) -> None:
        if torch.compiler.is_compiling():
            torch.ops.sidp.fetch_layer(x, self.runtime.handle, layer)
        else:
            self.runtime.fetch_layer(layer)

    def release(self, y: torch.Tensor, layer: int) -> None:
        if torch.compiler.is_compiling():
            torch.ops.sidp.release_layer(y, self.runtime.handle, layer)
        else:
            self.runtime.release_layer(layer)

    def remote(self, layer: int, op: str, x: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of an op of the layer's owner, each of ``x``'s shape but for the last dimension."""
        rows = x.reshape(-1, x.shape[-1])
        if torch.compiler.is_compiling():
            outputs = torch.ops.sidp.remote_compute(rows, self.runtime.handle, layer, op)
        else:
            result = self.runtime.remote_compute(layer, op, rows)
            outputs = list(result) if isinstance(result, tuple) else [result]
        return [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]

    def remote_one(self, layer: int, op: str, x: torch.Tensor) -> torch.Tensor:
        return self.remote(layer, op, x)[0]


class QkvShare:
    """One request for the three projections, which the model calls one after the other with the same input."""

    def __init__(self, state: StepState, layer: int) -> None:
        self._state = state
        self._layer = layer
        self._outputs: list[torch.Tensor] = []

    def take(self, position: int, x: torch.Tensor) -> torch.Tensor:
        if position == 0:
            self._outputs = self._state.remote(self._layer, "qkv", x)
        return self._outputs[position]


class _OnPool(nn.Module):
    """A module whose weight is a view of the pool: a plain attribute, so that nothing copies or moves it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def drop(self) -> None:
        """Lets go of the pool's memory."""
        self.weight = self.weight.new_empty(0)
        self.bias = None


class PooledLinear(_OnPool):
    """A linear of a decoder layer."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight, bias)
        self.out_features, self.in_features = weight.shape
        self.state: StepState | None = None
        self.remote: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.remote is not None and self.state is not None and self.state.is_cas:
            return self.remote(x)
        return functional.linear(x, self.weight, self.bias)


class PooledMlp(nn.Module):
    """A layer's MLP as one op of its owner in a CaS step."""

    def __init__(self, inner: nn.Module, state: StepState, layer: int) -> None:
        super().__init__()
        self.inner = inner
        self._state = state
        self._layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._state.is_cas:
            return self._state.remote_one(self._layer, "mlp", x)
        result: torch.Tensor = self.inner(x)
        return result


class PooledEmbedding(_OnPool):
    """Token embedding in the pool."""

    def __init__(self, weight: torch.Tensor, state: StepState, layer: int, streamed: bool) -> None:
        super().__init__(weight)
        self._state = state
        self._layer = layer
        self._streamed = streamed

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if not self._streamed:
            return functional.embedding(ids, self.weight)
        if self._state.is_cas:
            return self._state.remote_one(self._layer, "embedding", ids.unsqueeze(-1))
        self._state.fetch(ids, self._layer)
        y = functional.embedding(ids, self.weight)
        self._state.release(y, self._layer)
        return y


class PooledHead(_OnPool):
    """Output head in the pool."""

    def __init__(self, weight: torch.Tensor, state: StepState, layer: int, streamed: bool) -> None:
        super().__init__(weight)
        self._state = state
        self._layer = layer
        self._streamed = streamed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._streamed:
            return functional.linear(x, self.weight)
        if self._state.is_cas:
            return self._state.remote_one(self._layer, "head", x)
        self._state.fetch(x, self._layer)
        y = functional.linear(x, self.weight)
        self._state.release(y, self._layer)
        return y
