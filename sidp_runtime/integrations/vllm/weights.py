"""Filling the model: from safetensors, of which only what this rank holds is read, or made up from the names."""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..._torch import dtype_of
from ...errors import CheckpointError, ConfigError, UnsupportedError
from ...loading import Checkpoint, CheckpointSource, LoadReport
from ...manifest import DTYPE_BYTES, TensorSpec

# Stored linears of a decoder layer: parts of vLLM's merged ones, and the merged ones themselves.
_STORED = re.compile(
    r"(?:^|\.)layers\.(\d+)\.(?:self_attn\.(?:q|k|v|qkv|o)_proj|mlp\.(?:gate|up|gate_up|down)_proj)\.(?:weight|bias)$"
)


def read_checkpoint(
    model: Any, path: str, is_local: Callable[[int], bool], remote: set[nn.Parameter]
) -> tuple[LoadReport, int]:
    """Fills the model by its own ``load_weights``; returns what was read, and the bytes of the whole checkpoint.

    ``remote``: parameters that live on the ring; the rest must all be loaded. Peak beside the model: one tensor.
    """
    if not Path(path).is_dir():
        raise ConfigError(f"model {path!r} is not a directory: download it first, and give the folder")
    checkpoint = Checkpoint.open(path)
    if checkpoint.format != "safetensors":
        raise UnsupportedError(f"{path} is {checkpoint.format}; load_format='sidp' reads safetensors")
    begin = time.perf_counter()
    counts = {"tensors": 0, "bytes": 0}
    with CheckpointSource(checkpoint) as source:
        loaded = model.load_weights(_held_tensors(checkpoint, source, is_local, counts))
        read = source.bytes_read
    if not isinstance(loaded, set):
        raise UnsupportedError(f"{type(model).__name__}.load_weights does not say what it loaded, so no gap would show")
    missing = [name for name, value in model.named_parameters() if value not in remote and name not in loaded]
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} tensors of the model: {', '.join(missing[:4])}")
    report = LoadReport(read, counts["bytes"], time.perf_counter() - begin, counts["tensors"])
    return report, checkpoint.total_bytes


def _held_tensors(
    checkpoint: Checkpoint, source: CheckpointSource, is_local: Callable[[int], bool], counts: dict[str, int]
) -> Iterator[tuple[str, torch.Tensor]]:
    for entry in sorted(checkpoint.entries.values(), key=lambda e: (e.file, e.offset)):
        stored = _STORED.search(entry.name)
        if stored is not None and not is_local(int(stored[1])):
            continue
        if entry.dtype not in DTYPE_BYTES:
            raise UnsupportedError(f"tensor {entry.name!r} is stored as {entry.dtype}")
        spec = TensorSpec(entry.name, entry.shape, entry.dtype)
        tensor = torch.empty(entry.shape, dtype=dtype_of(entry.dtype), device="cpu")
        source.read_into(entry.name, tensor.view(-1).view(torch.uint8).numpy().data, spec)
        counts["tensors"] += 1
        counts["bytes"] += spec.num_bytes
        yield entry.name, tensor


def make_up(model: nn.Module, remote: set[nn.Parameter]) -> LoadReport:
    """Random weights, each from its own name: a layer in the wrong place shows. vLLM's dummies are equal in all layers.

    Matrices are normal with a deviation of 0.02 around 0, vectors around 1 (norms) or, biases, around 0.
    """
    begin = time.perf_counter()
    written = count = 0
    for name, value in model.named_parameters():
        if value in remote:
            continue
        generator = torch.Generator(device=value.device).manual_seed(zlib.crc32(name.encode()))
        value.data.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.02, generator=generator)
        written += value.nbytes
        count += 1
    return LoadReport(0, written, time.perf_counter() - begin, count)
