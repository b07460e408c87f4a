"""Replicas of synthetic decoder layers of a shape: pool, runtime, steps, and the same layers without a pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional

from sidp_runtime import LayerSpec, MachineProfile, Mode, ModePolicy, Op, Placement, Runtime, TensorSpec, WeightPool
from sidp_runtime._C import StepKind
from sidp_runtime._torch import dtype_of
from sidp_runtime.runtime import Step

from .rank import RankContext, WrongDataError
from .shapes import Shape

Weights = Mapping[str, torch.Tensor]
OP = "block"
# Every step's mode is given, so the profile decides nothing.
POLICY = ModePolicy(MachineProfile(copy_bytes_per_s=1.0, round_trip_us=1.0, memory_bytes_per_s=1.0, flops_per_s=1.0))


def block(w: Weights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From one attention to the next: [rows, attention + hidden] to [rows, qkv] and the residual, [rows, hidden].

    The residual is added by the product itself (``addmm``).
    """
    attention = w["o"].shape[1]
    residual = functional.linear(x[:, :attention], w["o"], x[:, attention:])
    gated = functional.silu(functional.linear(residual, w["gate"])) * functional.linear(residual, w["up"])
    residual = functional.linear(gated, w["down"], residual)
    return functional.linear(residual, w["qkv"]), residual


def next_rows(shape: Shape, qkv: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The next block's input. In place of attention its first columns go on: no figure here includes attention."""
    return torch.cat([qkv[:, : shape.attention], residual], 1)


def enough_layers(shape: Shape, world_size: int) -> Shape:
    """The shape with two layers or more for each rank, equally many."""
    return replace(shape, layers=max(shape.layers, 2 * world_size) // world_size * world_size)


def layer_specs(shape: Shape) -> list[LayerSpec]:
    tensors = tuple(TensorSpec(name, size, shape.dtype) for name, size in shape.tensors.items())
    return [LayerSpec(f"layers.{i}", tensors) for i in range(shape.layers)]


def fill(shape: Shape, layer: int, tensors: Weights) -> None:
    """Weights as a pure function of layer and name."""
    for index, (name, (_, fan_in)) in enumerate(shape.tensors.items()):
        generator = torch.Generator(tensors[name].device).manual_seed(100 * layer + index)
        tensors[name].normal_(0, 0.5 / fan_in**0.5, generator=generator)


@dataclass
class Replica:
    """One rank's pool and runtime over the layers of a shape."""

    context: RankContext
    shape: Shape
    pool: WeightPool
    runtime: Runtime

    def rows(self, count: int) -> torch.Tensor:
        generator = torch.Generator(self.context.device).manual_seed(count)
        x = torch.randn(count, self.shape.features, generator=generator, device=self.context.device)
        return x.to(dtype_of(self.shape.dtype))

    @property
    def streamed(self) -> list[int]:
        return self.pool.placement.streamed_layers(self.context.rank)

    @property
    def layer_bytes(self) -> int:
        return self.pool.layers[0].num_bytes

    def step(self, rows: int, mode: Mode, kind: StepKind = StepKind.RUN) -> Step:
        handle = torch.cuda.current_stream().cuda_stream if self.context.on_gpu else 0
        return Step(self.runtime, rows, handle, kind, mode)

    def forward(self, x: torch.Tensor, mode: Mode) -> torch.Tensor:
        """Inside a step: all layers, one after the other."""
        for layer in range(self.shape.layers):
            if mode == Mode.CAS and not self.pool.is_local(layer):
                qkv, residual = self.runtime.remote_compute(layer, OP, x)
            else:
                qkv, residual = block(self.runtime.fetch_layer(layer), x)
                self.runtime.release_layer(layer)
            x = next_rows(self.shape, qkv, residual)
        return x

    def eager(self, x: torch.Tensor, mode: Mode) -> torch.Tensor:
        with self.step(x.shape[0], mode):
            return self.forward(x, mode)

    def captured(self, x: torch.Tensor, mode: Mode) -> Callable[[], None]:
        """The same step as a CUDA graph: a call that replays it."""
        self.eager(x, mode)
        return self.captured_by(x.shape[0], mode, lambda: self.forward(x, mode))

    def captured_by(self, rows: int, mode: Mode, body: Callable[[], object]) -> Callable[[], None]:
        """A step of any body that has run before, as a CUDA graph."""
        self.context.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"), self.runtime.capture_step(rows, mode):
            body()

        def replay() -> None:
            with self.step(rows, mode, StepKind.REPLAY) as step:
                step.replay(graph)

        return replay

    @cached_property
    def local_layers(self) -> list[Weights]:
        """All layers of the shape, here: the own ones and copies of the others, so that products have equal values."""
        return [self.pool.layer_view(i) if self.pool.is_local(i) else self._copy(i) for i in range(self.shape.layers)]

    def _copy(self, layer: int) -> Weights:
        dtype, device = dtype_of(self.shape.dtype), self.context.device
        tensors = {name: torch.empty(size, dtype=dtype, device=device) for name, size in self.shape.tensors.items()}
        fill(self.shape, layer, tensors)
        return tensors

    def all_local(self, x: torch.Tensor) -> torch.Tensor:
        """Plain data parallelism: the same products without pool and runtime."""
        for weights in self.local_layers:
            x = next_rows(self.shape, *block(weights, x))
        return x

    def verify(self) -> None:
        """Fetches every streamed layer once and asks its owner once; ``WrongDataError`` if a byte or result is off."""
        wrong: list[Any] = []
        with self.step(1, Mode.WAS):
            for layer in self.streamed:
                tensors = self.runtime.fetch_layer(layer)
                reference = self._copy(layer)
                wrong += [(layer, name) for name in tensors if not torch.equal(tensors[name], reference[name])]
                self.runtime.release_layer(layer)
        if wrong:
            raise WrongDataError(f"fetched tensors differ from their owner's: {wrong}")
        if OP not in self.runtime._ops:
            return
        x = self.rows(1)
        for layer in self.streamed[-1:]:  # whose weights the reference holds
            with self.step(1, Mode.CAS):
                results = self.runtime.remote_compute(layer, OP, x)
            self.context.synchronize()
            self.runtime.check()
            for mine, theirs in zip(block(reference, x), results, strict=True):
                error = float((mine - theirs).float().norm() / mine.float().norm())
                if not error < 1e-2:
                    raise WrongDataError(f"layer {layer} computed by its owner is off by {error:.2g} of its norm")


def captured_call(context: RankContext, call: Callable[[], object]) -> Callable[[], None]:
    """Any work on the current stream as a CUDA graph."""
    call()
    context.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a service thread may launch meanwhile
        call()
    return graph.replay


@contextmanager
def open_replica(
    context: RankContext,
    shape: Shape | None = None,
    *,
    ring_slots: int = 2,
    buckets: tuple[int, ...] = (),
    fill_layers: bool = True,
    exclusive_links: bool = True,
) -> Iterator[Replica]:
    """Collective. ``buckets``: row counts that owners compute (the last is the most on the host); none: WaS only."""
    shape = shape or context.shape
    layers = layer_specs(shape)
    placement = Placement.by_layer([layer.num_bytes for layer in layers], context.world_size, ring_slots=ring_slots)
    names = {name: name for name in shape.tensors}
    op = Op(OP, block, shape.features, shape.dtype, {i: names for i in range(shape.layers)})
    arguments: dict[str, Any] = {"ops": [op], "max_rows": buckets[-1]} if buckets else {}
    if buckets and context.on_gpu:
        arguments["row_buckets"] = buckets
    with WeightPool(context.group, layers, placement) as pool:
        for layer in pool.local_layers if fill_layers else ():
            fill(shape, layer, pool.layer_view(layer))
        pool.publish()
        with Runtime(pool, policy=POLICY, exclusive_links=exclusive_links, **arguments) as runtime:
            replica = Replica(context, shape, pool, runtime)
            yield replica
            context.synchronize()
            context.meet()
