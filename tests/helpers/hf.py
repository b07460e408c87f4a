"""Small transformers models on disk, the real one of a PyPI package, and pooled replicas of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2
import transformers.models.qwen3.modeling_qwen3

import sidp_runtime as sidp
from helpers.processes import RankContext
from sidp_runtime.integrations.transformers import PooledModel, load_pooled_model
from sidp_runtime.loading import Checkpoint

VOCABULARY = 128
LAYERS = 5  # no multiple of 2, 3 or 4
_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
}


def save_tiny_model(folder: Path, family: str) -> Path:
    """Random weights as a Hugging Face directory: ``llama``, ``llama-bias`` (tied head), ``qwen2`` or ``qwen3``."""
    config: Any
    if family == "llama":
        config = transformers.LlamaConfig(**_SHAPE)
    elif family == "llama-bias":
        config = transformers.LlamaConfig(**_SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    elif family == "qwen2":
        config = transformers.Qwen2Config(**_SHAPE)
    else:
        config = transformers.Qwen3Config(**_SHAPE, head_dim=16)
    torch.manual_seed(0)
    automatic: Any = transformers.AutoModelForCausalLM
    model = automatic.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() == 2 else 1.0)
    model.save_pretrained(folder)
    return folder


def load_unpooled(path: Path) -> Any:
    """The same model as transformers itself loads it."""
    if path.suffix == ".gguf":
        return transformers.AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name).eval()
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@contextmanager
def pooled_model(context: RankContext, checkpoint: Checkpoint, name: str, **options: Any) -> Iterator[PooledModel]:
    """A replica of its own group; no rank leaves before all are done, so that counters stay those of living peers."""
    group = sidp.Group(context.rank, context.world_size, context.store(), name=name, deadline_ms=60_000)
    model = load_pooled_model(checkpoint, group, **options)
    yield model
    context.meet(f"{name}-done", 120)
    model.close()


def read_messages(path: Path) -> list[dict[str, Any]]:
    """The lines of a prompts file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
