"""Shape of a dense decoder from a Hugging Face ``config.json``: tensors by item, bytes, KV bytes by layer.

The pooled layers are ``LayerSpec`` objects of the same tensors that the runtime pools (a decoder layer's linears; norms
stay resident), so their bytes include the pool's own alignment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, UnsupportedError
from ..manifest import DTYPE_BYTES, LayerSpec, TensorSpec
from .families import FAMILIES, Family, check_dense, read_count, read_switch, windows

_BUNDLED = Path(__file__).with_name("models.json")
_DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Linear:
    """A matrix product of a decoder layer: rows of ``in_features`` to rows of ``out_features``."""

    name: str  # within the layer, e.g. "mlp.up_proj"
    out_features: int
    in_features: int
    bias: bool

    @property
    def num_params(self) -> int:
        return self.out_features * (self.in_features + int(self.bias))


@dataclass(frozen=True)
class ModelShape:
    """What the planner knows of a model. Counts are parameters; ``*_bytes`` are bytes of ``dtype``."""

    name: str
    model_type: str
    dtype: str
    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool  # the head is the embedding
    linears: tuple[Linear, ...]  # of each decoder layer
    norm_params: int  # of all norms together
    head_bias: bool
    windows: tuple[int | None, ...]  # tokens that a layer attends to, by layer; None: all
    notes: tuple[str, ...] = ()

    @property
    def element_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def layer_params(self) -> int:
        """Of one decoder layer's linears."""
        return sum(linear.num_params for linear in self.linears)

    @property
    def mlp_params(self) -> int:
        """Of one decoder layer's MLP."""
        return sum(linear.num_params for linear in self.linears if linear.name.startswith("mlp."))

    @property
    def embedding_params(self) -> int:
        return self.vocab * self.hidden

    @property
    def head_params(self) -> int:
        """Stored besides the embedding: 0 when tied, but for a bias."""
        return (0 if self.tied else self.embedding_params) + (self.vocab if self.head_bias else 0)

    @property
    def num_params(self) -> int:
        return self.num_layers * self.layer_params + self.norm_params + self.embedding_params + self.head_params

    @property
    def linear_bytes(self) -> int:
        """Of all decoder layers' linears."""
        return self.num_layers * self.layer_params * self.element_bytes

    @property
    def kv_layer_bytes(self) -> int:
        """KV bytes of one token in one layer: keys and values of every KV head."""
        return 2 * self.num_kv_heads * self.head_dim * self.element_bytes

    def kv_read_bytes(self, context: float) -> float:
        """KV bytes that one decoded token reads after ``context`` tokens, all layers, windows considered."""
        return self.kv_layer_bytes * sum(context if w is None else min(context, w) for w in self.windows)

    @property
    def row_bytes(self) -> int:
        """CaS: bytes of one row of one layer, there and back, over its three ops (qkv, output, MLP)."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return self.element_bytes * ((self.hidden + q + 2 * kv) + (q + self.hidden) + 2 * self.hidden)

    def layer_specs(self, *, mlp_only: bool = False) -> list[LayerSpec]:
        """The pool's layers in order of use. ``mlp_only``: attention stays resident."""
        chosen = [linear for linear in self.linears if not mlp_only or linear.name.startswith("mlp.")]
        return [LayerSpec(f"model.layers.{i}", tuple(self._tensors(i, chosen))) for i in range(self.num_layers)]

    def _tensors(self, layer: int, linears: list[Linear]) -> list[TensorSpec]:
        specs = []
        for linear in linears:
            name = f"model.layers.{layer}.{linear.name}"
            specs.append(TensorSpec(f"{name}.weight", (linear.out_features, linear.in_features), self.dtype))
            if linear.bias:
                specs.append(TensorSpec(f"{name}.bias", (linear.out_features,), self.dtype))
        return specs

    @classmethod
    def read(cls, model: str | Path, dtype: str | None = None) -> ModelShape:
        """From a model directory, a ``config.json``, or the name of a bundled shape (``bundled_models``).

        ``dtype``: of weights and KV; None: as the config says.
        """
        path = Path(model)
        if path.is_dir():
            path = path / "config.json"
        if path.is_file():
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path} is not a readable config.json: {error}") from error
            return cls.from_config(config, name=str(model), dtype=dtype)
        bundled = _bundled()
        if str(model) in bundled:
            return cls.from_config(bundled[str(model)], name=str(model), dtype=dtype)
        raise ConfigError(
            f"model {str(model)!r} is neither a directory with a config.json, nor such a file, nor one of the bundled "
            f"shapes: {', '.join(bundled)}"
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, name: str = "model", dtype: str | None = None) -> ModelShape:
        """From a config's content. ``UnsupportedError`` names what is not a dense decoder of a known family."""
        if not isinstance(config, Mapping):
            raise CheckpointError(f"{name}: the config is a {type(config).__name__}, not an object")
        notes: tuple[str, ...] = ()
        check_dense(config, name)
        dtype = dtype or config.get("dtype") or config.get("torch_dtype")
        if isinstance(inner := config.get("text_config"), Mapping):
            notes = ("parts outside text_config (a vision tower) are not counted",)
            config = inner
            check_dense(config, name)
            dtype = dtype or config.get("dtype") or config.get("torch_dtype")
        if dtype not in _DTYPES:
            raise UnsupportedError(
                f"{name}: dtype {dtype!r}; step times are known for {' and '.join(_DTYPES)}: give one of them as dtype"
            )
        model_type = str(config.get("model_type"))
        family = FAMILIES.get(model_type)
        if family is None:
            raise UnsupportedError(f"{name}: model type {model_type!r} is not one of {', '.join(FAMILIES)} (dense)")
        return _shape(family, model_type, {**family.defaults, **config}, name, str(dtype), notes)


def bundled_models() -> list[str]:
    """Names that ``ModelShape.read`` knows without a file."""
    return list(_bundled())


def bundled_config(name: str) -> dict[str, Any]:
    """The config of a bundled shape; ``ConfigError`` lists them."""
    bundled = _bundled()
    if name not in bundled:
        raise ConfigError(f"{name!r} is not one of the bundled shapes: {', '.join(bundled)}")
    return bundled[name]


def _bundled() -> dict[str, dict[str, Any]]:
    return dict(json.loads(_BUNDLED.read_text(encoding="utf-8")))


def _shape(
    family: Family, model_type: str, config: Mapping[str, Any], name: str, dtype: str, notes: tuple[str, ...]
) -> ModelShape:
    def count(key: str, default: int | None = None) -> int:
        return read_count(config, key, default, name)

    hidden, layers, heads = count("hidden_size"), count("num_hidden_layers"), count("num_attention_heads")
    kv_heads = count("num_key_value_heads", heads)
    head_dim = count("head_dim", hidden // heads)
    if heads % kv_heads:
        raise CheckpointError(f"{name}: {heads} attention heads are no multiple of {kv_heads} KV heads")
    inner, vocab = count("intermediate_size"), count("vocab_size")
    q, kv = heads * head_dim, kv_heads * head_dim
    sizes = {"hidden": hidden, "q": q, "kv": kv, "qkv": q + 2 * kv, "inner": inner, "gate_up": 2 * inner}
    qk_norm = 2 * head_dim if family.qk_norm else 0
    per_norm = hidden * (2 if family.norm_bias else 1)
    return ModelShape(
        name=name,
        model_type=model_type,
        dtype=dtype,
        hidden=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=inner,
        vocab=vocab,
        tied=read_switch(config, "tie_word_embeddings", family.tied, name),
        linears=tuple(
            Linear(part.name, sizes[part.rows], sizes[part.columns], part.has_bias(config, name))
            for part in family.linears
        ),
        norm_params=layers * (family.num_norms * per_norm + qk_norm) + per_norm,
        head_bias=family.head_bias,
        windows=windows(model_type, config, layers, name),
        notes=notes,
    )
