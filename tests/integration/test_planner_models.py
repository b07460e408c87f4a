"""The planner's shapes against the models that transformers builds: parameters, and the layers that are pooled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from helpers.model_configs import RELEASED

from sidp_runtime.integrations.transformers import SUPPORTED_MODEL_TYPES, _layers
from sidp_runtime.planner import ModelShape, plan_warnings

_TINY: dict[str, Any] = {
    "hidden_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 12,
    "intermediate_size": 100,
    "vocab_size": 130,
    "torch_dtype": "bfloat16",
}


def built(config: dict[str, Any]) -> Any:
    """The model without memory."""
    kept = {key: value for key, value in config.items() if key not in ("torch_dtype", "model_type")}
    with torch.device("meta"):
        made = transformers.CONFIG_MAPPING[config["model_type"]].from_dict({"pad_token_id": 0, **kept})
        return transformers.AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)


CASES = {name: config for name, (config, _) in RELEASED.items()} | {
    "llama": _TINY | {"model_type": "llama"},
    "llama-bias": _TINY
    | {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "qwen2": _TINY | {"model_type": "qwen2", "head_dim": None},
    "qwen3-bias": _TINY | {"model_type": "qwen3", "attention_bias": True},
}


@pytest.mark.parametrize("name", CASES)
def test_parameters_and_pooled_layers_are_the_models(name: str) -> None:
    config = CASES[name]
    if config["model_type"] == "qwen2" and "head_dim" in config:
        config = {key: value for key, value in config.items() if key != "head_dim"}
    model, shape = built(config), ModelShape.from_config(config)
    assert shape.num_params == sum(parameter.numel() for parameter in model.parameters())
    if config["model_type"] in SUPPORTED_MODEL_TYPES:
        layers, _ = _layers(model, "bfloat16", False, False)
        assert [layer.num_bytes for layer in shape.layer_specs()] == [layer.num_bytes for layer in layers]


def test_the_planner_knows_what_the_integration_loads() -> None:
    assert plan_warnings.LOADED_MODEL_TYPES == SUPPORTED_MODEL_TYPES
