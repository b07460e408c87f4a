"""Hugging Face transformers on one copy of the weights: decoder linears pooled, ``generate()`` unchanged.

    model = load_pooled_model(checkpoint, group, mode="auto", max_rows=512)
    model.model.generate(...)

A model is built without memory, each rank reads the layers it owns and the small tensors that every rank keeps, and
the linears of the decoder then work on the pool: on the layer's fixed address in a WaS step, by three requests
(qkv, output projection, MLP) to its owner in a CaS step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional

from .. import Mode, ModePolicy, Op, Placement, Runtime, TensorSpec, WeightPool
from .._torch import dtype_of
from ..errors import ConfigError, UnsupportedError
from ..group import Group
from ..loading import Checkpoint, CheckpointSource, LoadReport, Progress
from ..manifest import LayerSpec
from .pooled_modules import PooledEmbedding, PooledHead, PooledLinear, PooledMlp, QkvShare, StepState

#: Model types whose decoder layers have q/k/v/o and gate/up/down linears, checked by tests.
SUPPORTED_MODEL_TYPES = ("llama", "qwen2", "qwen3")

_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_SHORT = {name: name.rsplit(".", 1)[1].removesuffix("_proj") for name in _LINEARS}
_MODES = {"auto": None, "was": Mode.WAS, "cas": Mode.CAS}


@dataclass
class PooledModel:
    """A transformers model on a pool. ``model`` is an ordinary ``...ForCausalLM`` for inference."""

    model: Any
    runtime: Runtime
    pool: WeightPool
    load_report: LoadReport
    resident_bytes: int  # of tensors outside the pool, on every rank

    def memory_report(self) -> dict[str, int]:
        """Measured bytes (``sidp_runtime.memory.report``) with the computed ones beside them."""
        pool, rank = self.pool, self.pool.group.rank
        return {
            **pool.memory_report(),
            "pooled_bytes": pool.pooled_bytes,
            "owned_bytes": pool.placement.pool_bytes(rank),
            "pool_resident_bytes": pool.placement.resident_bytes,
            "ring_bytes": pool.placement.ring_bytes(rank),
            "replica_resident_bytes": self.resident_bytes,
        }

    def stats(self) -> dict[str, Any]:
        return self.runtime.stats()

    def close(self) -> None:
        """Leaves the group and lets go of the memory; the model is of no use afterwards. Idempotent."""
        for module in self.model.modules():
            if isinstance(module, (PooledLinear, PooledEmbedding, PooledHead)):
                module.drop()
        self.runtime.close()
        self.pool.close()


def load_pooled_model(
    checkpoint: Checkpoint,
    group: Group,
    *,
    dtype: str = "float32",
    mode: str = "auto",
    max_rows: int = 512,
    row_buckets: Sequence[int] | None = None,
    ring_slots: int = 2,
    resident_layers: Sequence[int] = (),
    pool_embedding: bool = False,
    pool_head: bool = False,
    progress: Progress | None = None,
) -> PooledModel:
    """Builds a model whose decoder linears lie in a pool shared with the other ranks of ``group``. Collective.

    ``dtype``: of all weights and of the arithmetic. ``mode``: ``auto``, ``was`` or ``cas``. ``max_rows``: rows (batch
    times tokens) of the largest CaS step; ``row_buckets``: see ``Runtime``. ``resident_layers``: decoder layers kept on
    every rank. Norms are resident; embedding and head by choice (a tied head that is pooled has its own copy of the
    embedding in the pool).

    On the group's device. Peak memory: what the rank owns, the ring, the resident tensors and one tensor where the
    file's dtype differs; on a GPU also the largest layer, on the host.

    Raises ``UnsupportedError`` for a model family outside ``SUPPORTED_MODEL_TYPES`` and what ``WeightPool``,
    ``CheckpointSource`` and ``Runtime`` raise, before memory is taken where that can be known.
    """
    if mode not in _MODES:
        raise ConfigError(f"mode {mode!r} is not one of {', '.join(_MODES)}")
    model = _empty_model(checkpoint, dtype)
    layers, names = _layers(model, dtype, pool_embedding, pool_head)
    first = 1 if pool_embedding else 0
    placement = Placement.by_layer(
        [layer.num_bytes for layer in layers],
        group.world_size,
        ring_slots=ring_slots,
        resident_layers=[first + layer for layer in resident_layers],
    )
    pool = WeightPool(group, layers, placement)
    try:
        source = CheckpointSource(_with_tied_head(checkpoint))
        pooled = {name for layer in names for name in layer}
        resident_bytes = _load_resident(model, source, dtype, group.device, pooled)
        load_report = pool.load(source, progress)
        runtime = Runtime(
            pool,
            policy=ModePolicy.calibrated_in_turns(pool, fixed=_MODES[mode]),
            ops=_ops(model, dtype, pool_embedding, pool_head) if group.world_size > 1 and mode != "was" else (),
            max_rows=max_rows if row_buckets is None else 0,
            row_buckets=row_buckets,
        )
    except BaseException:
        pool.close()
        raise
    _install(model, pool, runtime, pool_embedding, pool_head)
    return PooledModel(model, runtime, pool, load_report, resident_bytes)


def _empty_model(checkpoint: Checkpoint, dtype: str) -> Any:
    """The model's modules with parameters that have shapes and no memory."""
    settings = dict(checkpoint.config)
    model_type = settings.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise UnsupportedError(
            f"model type {model_type!r} is not supported; supported are {', '.join(SUPPORTED_MODEL_TYPES)} (dense)"
        )
    if settings.get("quantization_config"):
        raise UnsupportedError(
            "quantised safetensors are not supported; give a bf16, fp16 or fp32 checkpoint, or a GGUF"
        )
    config = transformers.CONFIG_MAPPING[model_type].from_dict(settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype_of(dtype))  # type: ignore[no-untyped-call]
    # Computed, not stored: a buffer made on meta has no values.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.eval()


def _linear_specs(model: Any, index: int, dtype: str) -> list[TensorSpec]:
    block = model.model.layers[index]
    specs = []
    for name in _LINEARS:
        linear = block.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise UnsupportedError(f"model.layers.{index}.{name} is a {type(linear).__name__}, not a linear")
        specs += [
            TensorSpec(f"model.layers.{index}.{name}.{parameter}", tuple(value.shape), dtype)
            for parameter, value in linear.named_parameters()
        ]
    return specs


def _layers(model: Any, dtype: str, pool_embedding: bool, pool_head: bool) -> tuple[list[LayerSpec], list[set[str]]]:
    layers = [
        LayerSpec(f"model.layers.{i}", tuple(_linear_specs(model, i, dtype))) for i in range(len(model.model.layers))
    ]
    if pool_embedding:
        spec = TensorSpec("model.embed_tokens.weight", tuple(model.model.embed_tokens.weight.shape), dtype)
        layers.insert(0, LayerSpec("model.embed_tokens", (spec,)))
    if pool_head:
        spec = TensorSpec("lm_head.weight", tuple(model.lm_head.weight.shape), dtype)
        layers.append(LayerSpec("lm_head", (spec,)))
    return layers, [{t.name for t in layer.tensors} for layer in layers]


def _with_tied_head(checkpoint: Checkpoint) -> Checkpoint:
    """A tied head is not stored: its name then means the embedding's bytes."""
    embedding = checkpoint.entries.get("model.embed_tokens.weight")
    if "lm_head.weight" in checkpoint.entries or embedding is None or not checkpoint.config.get("tie_word_embeddings"):
        return checkpoint
    entries = {**checkpoint.entries, "lm_head.weight": embedding}
    return Checkpoint(checkpoint.root, checkpoint.format, entries, checkpoint.config, checkpoint.files)


def _load_resident(
    model: Any, source: CheckpointSource, dtype: str, device: int | None, pooled: Collection[str]
) -> int:
    """Reads the tensors that every rank keeps; returns their bytes."""
    place = torch.device("cpu") if device is None else torch.device("cuda", device)
    model.model.rotary_emb.to(place)
    tied = model.config.tie_word_embeddings and "model.embed_tokens.weight" not in pooled
    total = 0
    for name, value in list(model.named_parameters()):
        if name in pooled:
            continue
        tensor = torch.empty(value.shape, dtype=dtype_of(dtype))
        spec = TensorSpec(name, tuple(value.shape), dtype)
        source.read_into(name, tensor.view(torch.uint8).view(-1).numpy().data, spec)
        owner, _, parameter = name.rpartition(".")
        setattr(model.get_submodule(owner), parameter, nn.Parameter(tensor.to(place), requires_grad=False))
        total += spec.num_bytes
    if tied and "lm_head.weight" not in pooled:
        model.lm_head.weight = model.model.embed_tokens.weight
    return total


def _linear(w: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, w[name], w.get(f"{name}_bias"))


def _ops(model: Any, dtype: str, pool_embedding: bool, pool_head: bool) -> list[Op]:
    block, first = model.model.layers[0], 1 if pool_embedding else 0
    activation: Callable[[torch.Tensor], torch.Tensor] = block.mlp.act_fn
    hidden = model.config.hidden_size

    def weights(*names: str) -> dict[int, dict[str, str]]:
        bound: dict[int, dict[str, str]] = {}
        for i, layer in enumerate(model.model.layers):
            bound[first + i] = {}
            for name in names:
                bound[first + i][_SHORT[name]] = f"model.layers.{i}.{name}.weight"
                if layer.get_submodule(name).bias is not None:
                    bound[first + i][f"{_SHORT[name]}_bias"] = f"model.layers.{i}.{name}.bias"
        return bound

    def qkv(w: Mapping[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _linear(w, "q", x), _linear(w, "k", x), _linear(w, "v", x)

    def output(w: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return _linear(w, "o", x)

    def mlp(w: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return _linear(w, "down", activation(_linear(w, "gate", x)) * _linear(w, "up", x))

    ops = [
        Op("qkv", qkv, hidden, dtype, weights(*_LINEARS[:3])),
        Op("output", output, block.self_attn.o_proj.in_features, dtype, weights(_LINEARS[3])),
        Op("mlp", mlp, hidden, dtype, weights(*_LINEARS[4:])),
    ]
    if pool_embedding:
        named = {0: {"embedding": "model.embed_tokens.weight"}}
        ops.append(
            Op(
                "embedding",
                lambda w, x: functional.embedding(x.select(1, 0), w["embedding"]),
                1,
                "int64",
                named,
            )
        )
    if pool_head:
        named = {first + len(model.model.layers): {"head": "lm_head.weight"}}
        ops.append(Op("head", lambda w, x: functional.linear(x, w["head"]), hidden, dtype, named))
    return ops


def _install(model: Any, pool: WeightPool, runtime: Runtime, pool_embedding: bool, pool_head: bool) -> None:
    """Puts modules that work on the pool in the place of those that have no memory."""
    state = StepState(runtime)
    first = 1 if pool_embedding else 0
    for i, block in enumerate(model.model.layers):
        layer, views = first + i, runtime.views(first + i)
        remote = not pool.is_local(layer)

        def linear(name: str, i: int = i, views: Mapping[str, torch.Tensor] = views) -> PooledLinear:
            prefix = f"model.layers.{i}.{name}"
            return PooledLinear(views[f"{prefix}.weight"], views.get(f"{prefix}.bias"))

        share = QkvShare(state, layer) if remote else None
        for position, name in enumerate(_LINEARS):
            pooled = linear(name)
            if share is not None and position < 3:
                pooled.remote = functools.partial(share.take, position)
            elif remote and position == 3:
                pooled.remote = functools.partial(state.remote_one, layer, "output")
            pooled.state = state
            block.set_submodule(name, pooled)
        if remote:
            block.mlp = PooledMlp(block.mlp, state, layer)
        block.register_forward_pre_hook(functools.partial(state.before_layer, layer))
        block.register_forward_hook(functools.partial(state.after_layer, layer))
    if pool_embedding:
        weight = runtime.views(0)["model.embed_tokens.weight"]
        model.model.embed_tokens = PooledEmbedding(weight, state, 0, not pool.is_local(0))
    if pool_head:
        last = len(pool.layers) - 1
        model.lm_head = PooledHead(runtime.views(last)["lm_head.weight"], state, last, not pool.is_local(last))
    left = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    if left:
        raise UnsupportedError(f"{len(left)} tensors of the model are neither pooled nor loaded: {', '.join(left[:4])}")
    state.wrap_forward(model)
