"""Hugging Face configs of released models, without what the planner does not read, and their parameter counts."""

from __future__ import annotations

from typing import Any


def _config(model_type: str, hidden: int, layers: int, heads: int, kv: int, inner: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "torch_dtype": "bfloat16",
    }


#: Config and parameters, as the checkpoints have them.
RELEASED: dict[str, tuple[dict[str, Any], int]] = {
    "Qwen3-0.6B": (
        _config("qwen3", 1024, 28, 16, 8, 3072, 151936) | {"head_dim": 128, "tie_word_embeddings": True},
        596_049_920,
    ),
    "Qwen3-8B": (_config("qwen3", 4096, 36, 32, 8, 12288, 151936) | {"head_dim": 128}, 8_190_735_360),
    "Qwen2.5-7B": (_config("qwen2", 3584, 28, 28, 4, 18944, 152064), 7_615_616_512),
    "Mistral-7B-v0.1": (_config("mistral", 4096, 32, 32, 8, 14336, 32000) | {"sliding_window": 4096}, 7_241_732_096),
    "Gemma-7B": (_config("gemma", 3072, 28, 16, 16, 24576, 256000) | {"head_dim": 256}, 8_537_680_896),
    "Gemma-2-9B": (_config("gemma2", 3584, 42, 16, 8, 14336, 256000) | {"head_dim": 256}, 9_241_705_984),
    "Gemma-3-1B": (
        _config("gemma3_text", 1152, 26, 4, 1, 6912, 262144) | {"head_dim": 256, "sliding_window": 512},
        999_885_952,
    ),
    "Phi-2": (_config("phi", 2560, 32, 32, 32, 10240, 51200), 2_779_683_840),
    "Phi-3-mini": (_config("phi3", 3072, 32, 32, 32, 8192, 32064) | {"sliding_window": 2047}, 3_821_079_552),
    "Phi-4": (_config("phi3", 5120, 40, 40, 10, 17920, 100352) | {"sliding_window": None}, 14_659_507_200),
}
