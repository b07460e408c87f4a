"""Predicted time of a step: the mode policy's formulas (``include/sidp/mode_policy.hpp``), attention, head and waits.

``docs/model.md`` derives them and says what they leave out.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import _C
from .gpus import GpuProfile
from .model_shape import ModelShape

#: ``remote_compute`` calls a layer: qkv, output projection, MLP.
OPS_PER_LAYER = 3
#: Seconds that a remote layer costs in CaS besides round trips, rows and, where layers are resident, ``kResidentWait``.
#: Fitted to decode steps of vLLM on two H200, which are all within 7 % with both and up to 11 % short without
#: (``docs/model.md``).
CAS_WAIT_S = 40e-6
CAS_MEASURED_REPLICAS = 4  # with up to so many CaS may decide; with more it was not measured


@dataclass(frozen=True)
class StepLoad:
    """Rows of one step of a replica. Means over many steps, so not whole numbers.

    ``decode_rows``: sequences that get one token; ``context``: tokens that each of them attends to.
    ``prefill_rows``: prompt tokens, of prompts of ``prompt_tokens``. ``padding_rows``: what a CUDA graph of more rows
    adds to the decoder layers' products.
    """

    decode_rows: float
    context: float = 0.0
    prefill_rows: float = 0.0
    prompt_tokens: float = 1.0
    padding_rows: float = 0.0

    @property
    def rows(self) -> float:
        return self.decode_rows + self.prefill_rows + self.padding_rows


@dataclass(frozen=True)
class Streamed:
    """What a rank does not hold: the layers to be copied or asked for in each step. ``resident_bytes``: held by all."""

    num_layers: int
    num_bytes: int
    resident_bytes: int = 0


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step. ``local_s``: with all weights here; ``work_s``: that, beside a stream written to memory.

    ``copy_s``: the streamed layers on a link of one's own; ``was_floor_s``: WaS with such a link; ``was_s``: where
    replicas that drift take turns on the links, as simulated. ``cas_s``: replicas follow each other through the owners,
    and wait for them by ``CAS_WAIT_S`` a layer.
    """

    local_s: float
    copy_s: float
    work_s: float
    was_floor_s: float
    was_s: float
    cas_s: float


def attention_s(gpu: GpuProfile, shape: ModelShape, load: StepLoad) -> float:
    """Decoded rows read their KV from memory; prompt rows are bound by arithmetic (half of the square is masked)."""
    read_s = load.decode_rows * shape.kv_read_bytes(load.context) / gpu.rates.memory_bytes_per_s
    attended = sum(
        load.prompt_tokens / 2 if w is None else min(load.prompt_tokens / 2, float(w)) for w in shape.windows
    )
    flops = load.prefill_rows * 4.0 * shape.num_heads * shape.head_dim * attended
    return read_s + flops / gpu.rates.flops_per_s


def head_s(gpu: GpuProfile, shape: ModelShape, load: StepLoad) -> float:
    """Only rows that yield a token go through the head: every decoded one and the last of each prompt."""
    sampled = load.decode_rows + load.prefill_rows / load.prompt_tokens
    return gpu.linears_s(shape.embedding_params * shape.element_bytes, sampled, shape.element_bytes)


def local_s(gpu: GpuProfile, shape: ModelShape, load: StepLoad) -> float:
    """A step of plain DP."""
    linears = gpu.linears_s(shape.linear_bytes, load.rows, shape.element_bytes)
    return linears + attention_s(gpu, shape, load) + head_s(gpu, shape, load)


def step_times(gpu: GpuProfile, shape: ModelShape, load: StepLoad, streamed: Streamed, world_size: int) -> StepTimes:
    """Both modes. WaS: the work with the stream's bytes written to memory beside it, against a stream that takes turns.

    CaS with all replicas busy: each owner computes its layers for every replica, which is as much work as all layers
    for itself; round trips, the rows' bytes and waits come on top. The policy knows no attention, and so not what that
    makes them wait, ``CAS_WAIT_S``.
    """
    core = _C.StepShape(
        total_bytes=shape.linear_bytes,
        streamed_bytes=streamed.num_bytes,
        resident_bytes=streamed.resident_bytes,
        streamed_layers=streamed.num_layers,
        ops_per_layer=OPS_PER_LAYER,
        row_bytes=shape.row_bytes,
        element_bytes=shape.element_bytes,
        world_size=world_size,
    )
    other = attention_s(gpu, shape, load) + head_s(gpu, shape, load)
    times = _C.predict_step(load.rows, gpu.rates.core, core, other)
    return StepTimes(
        local_s=times.local_s,
        copy_s=times.copy_s,
        work_s=times.work_s,
        was_floor_s=times.was_floor_s,
        was_s=times.was_s,
        cas_s=times.cas_s + CAS_WAIT_S * streamed.num_layers,
    )


def tensor_parallel_s(gpu: GpuProfile, shape: ModelShape, load: StepLoad, degree: int) -> float:
    """Work split ``degree`` ways and two all-reduces a layer by rings, each at the latency of one round trip."""
    if degree == 1:
        return local_s(gpu, shape, load)
    reduced = 2 * (degree - 1) / degree * load.rows * shape.hidden * shape.element_bytes
    one = gpu.rates.round_trip_us * 1e-6 + reduced / gpu.rates.copy_bytes_per_s
    return local_s(gpu, shape, load) / degree + 2 * shape.num_layers * one
