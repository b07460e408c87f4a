"""A real GGUF file against transformers' own reading of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.gguf_model import read, real_model
from transformers import AutoTokenizer

from sidp_runtime.loading import Checkpoint, tokenizer_dir


@pytest.mark.slow
def test_real_model_equals_transformers(tmp_path: Path, unpooled_real_model: Path) -> None:
    """Our reading of a real Q4_1 file, and its tokenizer, against transformers' own."""
    path = real_model()
    model = torch.load(unpooled_real_model, weights_only=False)
    expected = model.state_dict()
    checkpoint = Checkpoint.open(path.parent, tmp_path)
    assert checkpoint.entries.keys() | {"lm_head.weight"} == expected.keys()
    for name in (
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.29.self_attn.k_proj.weight",
        "model.layers.29.mlp.down_proj.weight",
        "model.layers.7.input_layernorm.weight",
    ):
        for dtype in ("float32", "bfloat16"):
            assert torch.equal(read(checkpoint, name, dtype), expected[name].to(getattr(torch, dtype))), name
    assert checkpoint.config["hidden_size"] == model.config.hidden_size == 576

    place = tokenizer_dir(checkpoint, tmp_path)
    assert tokenizer_dir(checkpoint, tmp_path) == place
    text = "Hello, wörld! 1234 <|im_start|>user\n"
    ids = AutoTokenizer.from_pretrained(place)(text).input_ids
    assert ids == AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)(text).input_ids
    assert len(ids) > 5
