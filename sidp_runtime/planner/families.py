"""Dense decoder families: which linears and norms a layer has, and which layers attend to a window only.

Facts of the model definitions in Hugging Face transformers (checked against parameter counts of models built there).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import CheckpointError, UnsupportedError


def read_count(config: Mapping[str, Any], key: str, default: int | None, name: str, least: int = 1) -> int:
    """An integer of a config; ``default`` where it is absent or null. ``CheckpointError`` for anything else."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise CheckpointError(f"{name}: {key} is {value!r} in the config, must be an integer of at least {least}")
    return value


def read_switch(config: Mapping[str, Any], key: str, default: bool, name: str) -> bool:
    """A boolean of a config; ``default`` where it is absent or null. ``CheckpointError`` for anything else."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise CheckpointError(f"{name}: {key} is {value!r} in the config, must be true or false")
    return value


@dataclass(frozen=True)
class Part:
    """A linear of a layer by the names of its sizes. ``bias``: always, never, or the config's switch of that name."""

    name: str
    rows: str
    columns: str
    bias: bool | str = False

    def has_bias(self, config: Mapping[str, Any], name: str) -> bool:
        return read_switch(config, self.bias, False, name) if isinstance(self.bias, str) else self.bias


def _gated(
    qkv_bias: bool | str = False, out_bias: bool | str = False, mlp_bias: bool | str = False
) -> tuple[Part, ...]:
    return (
        Part("self_attn.q_proj", "q", "hidden", qkv_bias),
        Part("self_attn.k_proj", "kv", "hidden", qkv_bias),
        Part("self_attn.v_proj", "kv", "hidden", qkv_bias),
        Part("self_attn.o_proj", "hidden", "q", out_bias),
        Part("mlp.gate_proj", "inner", "hidden", mlp_bias),
        Part("mlp.up_proj", "inner", "hidden", mlp_bias),
        Part("mlp.down_proj", "hidden", "inner", mlp_bias),
    )


_PHI3 = (
    Part("self_attn.qkv_proj", "qkv", "hidden"),
    Part("self_attn.o_proj", "hidden", "q"),
    Part("mlp.gate_up_proj", "gate_up", "hidden"),
    Part("mlp.down_proj", "hidden", "inner"),
)
_PHI = (
    Part("self_attn.q_proj", "q", "hidden", True),
    Part("self_attn.k_proj", "kv", "hidden", True),
    Part("self_attn.v_proj", "kv", "hidden", True),
    Part("self_attn.dense", "hidden", "q", True),
    Part("mlp.fc1", "inner", "hidden", True),
    Part("mlp.fc2", "hidden", "inner", True),
)


@dataclass(frozen=True)
class Family:
    """``num_norms``: of ``hidden`` weights in a layer. ``tied`` and ``defaults``: where the config is silent."""

    linears: tuple[Part, ...]
    num_norms: int = 2
    qk_norm: bool = False
    norm_bias: bool = False
    head_bias: bool = False
    tied: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


_GEMMA: dict[str, Any] = {"head_dim": 256}
# Multimodal Gemma 3 configs leave these out.
_GEMMA3: dict[str, Any] = {**_GEMMA, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_208}

#: By ``model_type``.
FAMILIES: dict[str, Family] = {
    "llama": Family(_gated("attention_bias", "attention_bias", "mlp_bias")),
    "qwen2": Family(_gated(True)),
    "qwen3": Family(_gated("attention_bias", "attention_bias"), qk_norm=True, defaults={"head_dim": 128}),
    "mistral": Family(_gated()),
    "gemma": Family(_gated("attention_bias", "attention_bias"), tied=True, defaults=_GEMMA),
    "gemma2": Family(
        _gated("attention_bias", "attention_bias"),
        num_norms=4,
        tied=True,
        defaults={**_GEMMA, "sliding_window": 4096},
    ),
    "gemma3_text": Family(
        _gated("attention_bias", "attention_bias"),
        num_norms=4,
        qk_norm=True,
        tied=True,
        defaults={**_GEMMA3, "sliding_window": 4096},
    ),
    "phi": Family(_PHI, num_norms=1, norm_bias=True, head_bias=True),
    "phi3": Family(_PHI3),
}

_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def check_dense(config: Mapping[str, Any], name: str) -> None:
    """``UnsupportedError`` for experts or quantised weights, with the model type and the count."""
    model_type = config.get("model_type")
    for key in _EXPERT_KEYS:
        experts = read_count(config, key, 0, name, least=0)
        if experts > 0:
            raise UnsupportedError(
                f"{name}: model type {model_type!r} is a mixture of experts ({key} {experts}); only dense models are "
                "planned: which experts a step reads depends on its tokens"
            )
    if "moe" in str(model_type) or model_type == "mixtral":
        raise UnsupportedError(
            f"{name}: model type {model_type!r} is a mixture of experts; only dense models are planned"
        )
    if config.get("quantization_config"):
        raise UnsupportedError(f"{name}: quantised weights are not planned; give the config of a bf16 or fp16 model")


def windows(model_type: str, config: Mapping[str, Any], num_layers: int, name: str) -> tuple[int | None, ...]:
    """Tokens that each layer attends to; None: all of them."""
    size = config.get("sliding_window")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise CheckpointError(
            f"{name}: sliding_window is {size!r} in the config, must be an integer of at least 1 or null"
        )
    types = config.get("layer_types")
    if model_type in ("qwen2", "qwen3") and not read_switch(config, "use_sliding_window", False, name):
        size = None
    if size is None:
        return (None,) * num_layers
    if types is not None:
        known = {"sliding_attention": size, "full_attention": None}
        if (
            not isinstance(types, list)
            or len(types) != num_layers
            or any(not isinstance(kind, str) or kind not in known for kind in types)
        ):
            raise CheckpointError(
                f"{name}: layer_types must name one of {', '.join(known)} for each of {num_layers} layers"
            )
        return tuple(known[kind] for kind in types)
    if model_type in ("mistral", "phi3"):
        return (size,) * num_layers
    if model_type in ("qwen2", "qwen3"):
        first = read_count(config, "max_window_layers", num_layers, name, least=0)
        return tuple(size if i >= first else None for i in range(num_layers))
    if model_type in ("gemma2", "gemma3_text"):
        period = 2 if model_type == "gemma2" else read_count(config, "sliding_window_pattern", 6, name)
        return tuple(None if (i + 1) % period == 0 else size for i in range(num_layers))
    return (None,) * num_layers
