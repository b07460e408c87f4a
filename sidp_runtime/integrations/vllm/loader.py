"""vLLM's model loader "sidp": a model whose decoder linears lie in a pool that N engines share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.offloader.base import set_offloader

from ... import Group, LayerSpec, Mode, ModePolicy, Op, Placement, Runtime, WeightPool, _torch, _torch_gpu
from ... import config as environment
from ..._torch import name_of
from ...errors import UnsupportedError, UsageError
from ...ops import OpFunction, spread_rows
from . import compat, settings, weights
from .engine import Engine, set_engine
from .linears import apply, kernels_of, pooled_linears, product_of, stand_ins
from .offloader import MakePool, PoolOffloader
from .step import OPERATORS, Compute, StepState, compute, set_state

logger = init_logger(f"vllm.{__name__}")  # vLLM's handlers print only below its own name

_MODES = {"auto": None, "was": Mode.WAS, "cas": Mode.CAS}


class SidpModelLoader(BaseModelLoader):  # type: ignore[misc]
    """Set-up is collective: every engine of the group must get here within ``setup_ms``.

    All memory of the pool is taken inside ``load_model``, between vLLM's two looks at the free memory, so it is counted
    once. Raises ``UnsupportedError`` and ``ConfigError`` before that, saying what does not fit.
    """

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        compat.check_hooks()
        self._offloader: PoolOffloader | None = None
        self._settings: settings.Settings | None = None
        self._make_pool: MakePool | None = None
        self._load: dict[str, Any] = {}

    def download_model(self, model_config: Any) -> None:
        """Nothing: the model is a directory."""

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Called by vLLM once the model is built; it makes the pool. A published pool's weights cannot be changed."""
        offloader, chosen = self._offloader, self._settings
        if offloader is None or chosen is None or self._make_pool is None:
            raise UsageError("weights in a pool are loaded once, when the model is built; reloading is not supported")
        if not offloader.blocks:
            raise UnsupportedError(
                f"{type(model).__name__} does not build its decoder layers with vLLM's make_layers, so none was pooled"
            )
        compat.keep_weights_plain(model)
        source: weights.Weights = (
            weights.MadeUpWeights()
            if chosen.pool.weights == "dummy"
            else weights.StoredWeights(
                model, model_config.model, len(offloader.blocks), page_locked=chosen.pool.backend != "host"
            )
        )
        rest = dict(model.named_parameters())
        for name in compat.optional_parameters(model):
            rest.pop(name, None)
        by_layer = [{name: rest.pop(name) for name in names} for names in offloader.names_in(model)]

        make = self._make_pool

        def make_pool(layers: Sequence[LayerSpec]) -> WeightPool:
            pool = make(layers)
            source.expect([layer for layer in range(len(layers)) if pool.is_local(layer)])
            return pool

        with contextlib.closing(source):
            offloader.fill(make_pool, lambda layer: source.fill(layer, by_layer[layer]))
            source.fill(None, rest)
        report, stored = source.report()
        self._load = {**vars(report), "checkpoint_bytes": stored}

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """The model, ready to run, and this process's engine set."""
        compat.check_settings(vllm_config)
        chosen = self._settings = settings.read(vllm_config)
        compat.check_backend(chosen.pool.backend)
        on_gpu = chosen.pool.backend != "host"
        if on_gpu and chosen.pool.mode != "was":
            environment.check_kernels_early()
        compat.check_worker(vllm_config)
        compat.split_graphs_at(vllm_config, OPERATORS)
        settings.key_graphs(vllm_config, chosen.pool)
        # With all kernels loaded early a context on each peer's GPU has them too: 1480 MiB on an H200
        owners_engines = not environment.kernels_load_early()
        taken = _torch_gpu.Taken(torch.cuda.current_device() if on_gpu else None)
        group = _join(chosen)
        taken.mark("group")
        num_layers = int(model_config.hf_text_config.num_hidden_layers)
        self._offloader = offloader = PoolOffloader(num_layers)
        self._make_pool = functools.partial(_make_pool, group, chosen, taken)
        set_offloader(offloader)  # after the runner set its own, before any layer is built
        try:
            model: nn.Module = super().load_model(vllm_config, model_config, prefix)
            pool = offloader.pool
            assert pool is not None  # load_weights has looked
            offloader.give_methods_back()
            pool.publish()
            taken.mark("model")
            with torch.no_grad():
                captured = compat.captured_rows(vllm_config)
                # In mode cas free: a mode that was asked for is pinned, as steps of too many rows must be WaS
                policy = ModePolicy.calibrated_in_turns(pool, fixed=Mode.WAS if chosen.pool.mode == "was" else None)
                taken.mark("profile")
                runtime = _make_runtime(
                    pool, policy, chosen, offloader.blocks, model_config.dtype, captured, owners_engines
                )
            if on_gpu:
                group.barrier("vllm/made")  # so that the peers' share of this GPU is counted
            taken.mark("runtime")
        except BaseException:
            if offloader.pool is not None and group.device is None:
                offloader.pool.close()
            raise
        finally:
            self._offloader = self._make_pool = None
        state = StepState(runtime, num_layers, chosen.pool.max_rows, _MODES[chosen.pool.mode], first_is_was=on_gpu)
        install(model, offloader.blocks, state, with_computes=chosen.pool.mode != "was")
        set_state(state)
        engine = Engine(chosen, group, pool, runtime, state, self._load, taken)
        set_engine(engine)
        logger.info("sidp: %s", engine.describe())
        return model


def _join(chosen: settings.Settings) -> Group:
    own, rank = chosen.own, chosen.rank
    if chosen.world_size == 1 and not chosen.host:
        store, _, _ = _torch.make_store_server()
    else:
        store = _torch.connect_store(chosen.host, chosen.port, own.setup_ms, is_master=rank == 0 and own.serve_store)
    return Group(
        rank,
        chosen.world_size,
        store,
        backend=chosen.pool.backend,
        name=own.name,
        token=own.token,
        deadline_ms=own.setup_ms,
    )


def _make_pool(
    group: Group, chosen: settings.Settings, taken: _torch_gpu.Taken, layers: Sequence[LayerSpec]
) -> WeightPool:
    placement = Placement.by_layer(
        [layer.num_bytes for layer in layers],
        group.world_size,
        ring_slots=chosen.pool.ring_slots,
        resident_layers=list(chosen.pool.resident_layers),
    )
    taken.mark("model")
    pool = WeightPool(group, layers, placement)
    taken.mark("pool")
    return pool


def row_buckets(max_rows: int, captured: Sequence[int]) -> list[int]:
    """Those of ``spread_rows``, rounded up to the ``captured`` row counts, ascending, of which most steps are.

    An owner captures its ops for each of these, so there are not as many as vLLM captures.
    """
    sizes = sorted({size for size in captured if size < max_rows} | {max_rows})
    return sorted({next(size for size in sizes if size >= rows) for rows in spread_rows(max_rows)})


def _make_runtime(
    pool: WeightPool,
    policy: ModePolicy,
    chosen: settings.Settings,
    blocks: Sequence[nn.Module],
    dtype: torch.dtype,
    captured: Sequence[int],
    owners_engines: bool,
) -> Runtime:
    wanted = chosen.pool.mode != "was" and chosen.world_size > 1
    max_rows = chosen.pool.max_rows if wanted else 0
    return Runtime(
        pool,
        policy=policy,
        ops=_ops(pool, blocks, dtype) if wanted else (),
        max_rows=max_rows,
        row_buckets=row_buckets(max_rows, captured) if wanted and captured else None,
        owners_engines=owners_engines,
        deadline_ms=environment.deadline_ms() if chosen.own.deadline_ms is None else chosen.own.deadline_ms,
    )


def _ops(pool: WeightPool, blocks: Sequence[nn.Module], dtype: torch.dtype) -> list[Op]:
    """At most three round trips a layer: the projections of the attention's input, of its output, and the MLP.

    Each computes what the linears' methods do, on tensors of any layer: the layers differ in nothing else.
    """
    first: Any = blocks[0]
    name = type(first.mlp.act_fn).__name__
    if name != "SiluAndMul":
        raise UnsupportedError(f"the MLP's activation is {name}; CaS knows SiluAndMul: use mode 'was'")
    activation = compat.activation_of(first.mlp.act_fn)
    linears = pooled_linears(first)
    for name, linear in linears.items():
        compat.check_token_wise(name, linear.quant_method)

    def multiply(w: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
        return apply(stand_ins({name: linears[name]}, w)[name], linears[name].quant_method, x)

    def mlp(w: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return multiply(w, "mlp.down_proj", activation(multiply(w, "mlp.gate_up_proj", x)))

    def op(name: str, function: OpFunction, *names: str) -> Op:
        weights = {
            i: {t.name.removeprefix(f"layers.{i}."): t.name for t in layer.tensors if _linear_of(t.name) in names}
            for i, layer in enumerate(pool.layers)
        }
        outputs = ((linears[names[-1]].output_size_per_partition, name_of(dtype)),)
        kernel = kernels_of({name: linears[name] for name in names})
        in_features = linears[names[0]].input_size_per_partition
        return Op(name, function, in_features, name_of(dtype), weights, outputs, kernel)

    return [
        op("qkv", lambda w, x: multiply(w, "self_attn.qkv_proj", x), "self_attn.qkv_proj"),
        op("output", lambda w, x: multiply(w, "self_attn.o_proj", x), "self_attn.o_proj"),
        op("mlp", mlp, "mlp.gate_up_proj", "mlp.down_proj"),
    ]


def _linear_of(tensor: str) -> str:
    """The name in its layer of the linear that a pool's tensor belongs to: ``layers.3.mlp.down_proj.weight``."""
    return tensor.split(".", 2)[2].rpartition(".")[0]


class _ComputedLinear:
    """Stands in for a linear's method: what the owner of the layer computes, or, in a WaS step, the method itself."""

    def __init__(self, layer: int, op: str, out_features: int) -> None:
        self._layer, self._op, self._out_features = layer, op, out_features

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return compute(x, self._layer, self._op, self._out_features)


class _ComputedMlp(nn.Module):
    def __init__(self, inner: nn.Module, layer: int, out_features: int) -> None:
        super().__init__()
        self.inner = inner
        self._layer, self._out_features = layer, out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return compute(x, self._layer, "mlp", self._out_features)


def install(model: nn.Module, blocks: Sequence[nn.Module], state: StepState, *, with_computes: bool) -> None:
    """Makes each call of the model a step, and puts the operators around and into its decoder layers.

    A layer that is resident has its own linears. With computes it has the operators around it all the same: a CaS step
    takes turns there with what peers ask of its GPU. Without, it is vLLM's, and adds no piece to the graphs.
    """

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        state.begin(int(tokens.shape[0]), compat.whole_graph())

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        state.end()

    model.register_forward_pre_hook(begin, with_kwargs=True)
    model.register_forward_hook(end)
    for index, block in enumerate(blocks):
        resident = state.is_resident(index)
        if with_computes and not resident:
            _install_computes(index, block, state)
        if with_computes or not resident:
            block.register_forward_pre_hook(functools.partial(_before, index), with_kwargs=True)
            block.register_forward_hook(functools.partial(_after, index))


def _before(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # The hidden states, not the positions: the layer's first product must depend on what is said to change.
    torch.ops.sidp.vllm_fetch(kwargs["hidden_states"] if "hidden_states" in kwargs else args[1], index)


def _after(index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    torch.ops.sidp.vllm_release(output[0], index)


def _install_computes(index: int, block: Any, state: StepState) -> None:
    for op, linear in (("qkv", block.self_attn.qkv_proj), ("output", block.self_attn.o_proj)):
        state.computes[index, op] = product_of(linear)
        state.methods.append((linear, linear.quant_method))
        linear.quant_method = _ComputedLinear(index, op, linear.output_size_per_partition)
    inner = block.mlp
    activation, down = compat.activation_of(inner.act_fn), product_of(inner.down_proj)
    state.computes[index, "mlp"] = functools.partial(_mlp, inner, activation, down)
    block.mlp = _ComputedMlp(inner, index, inner.down_proj.output_size_per_partition)


def _mlp(
    inner: Any,
    activation: Callable[[torch.Tensor], torch.Tensor],
    down: Compute,
    x: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """What its forward does."""
    gate_up, _ = inner.gate_up_proj(x)
    return down(activation(gate_up), out)
