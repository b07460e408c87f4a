"""Pooled linears without an engine: how they get onto the pool, and what of a quantisation is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm runs these tests where it is")

import helpers.vllm_quiet  # noqa: F401 - before the others
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.model_loader.utils import process_weights_after_loading

from sidp_runtime import LayerSpec, _torch
from sidp_runtime.errors import CheckpointError, UnsupportedError
from sidp_runtime.integrations.vllm import compat, weights
from sidp_runtime.integrations.vllm.linears import LINEARS, apply, kernels_of, pooled_linears, product_of, stand_ins
from sidp_runtime.integrations.vllm.offloader import PoolOffloader

LAYERS, ROWS, COLUMNS = 3, 4, 6
LOCAL = (0, 2)


class Halved(LinearMethodBase):
    """As fp8 methods do: weights transposed, one scale for all of them, of no dimension, and a choice made."""

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: Any) -> None:
        assert layer.weight_scale_inv.max() > 0
        layer.weight = nn.Parameter((layer.weight / layer.weight_scale_inv.max()).t(), requires_grad=False)
        layer.weight_scale = nn.Parameter(layer.weight_scale_inv.max().detach(), requires_grad=False)
        layer.weight_scale_inv = layer.input_scale = None
        self.more(layer)

    def more(self, layer: Any) -> None:
        layer.padding = 17

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return nn.functional.linear(x, (layer.weight * layer.weight_scale).t(), bias)


class HalvedInPlace(Halved):
    """The same on the parameter that it was given."""

    def process_weights_after_loading(self, layer: Any) -> None:
        scale = layer.weight_scale_inv.max()
        layer.weight.data = (layer.weight.data / scale).t()
        layer.weight_scale = nn.Parameter(scale.detach(), requires_grad=False)
        layer.weight_scale_inv = layer.input_scale = None
        self.more(layer)


def block(method: Callable[[], Any]) -> nn.Module:
    parts: dict[str, nn.Module] = {"self_attn": nn.Module(), "mlp": nn.Module()}
    for name in LINEARS:
        linear: Any = object.__new__(LinearBase)
        nn.Module.__init__(linear)
        linear.weight = nn.Parameter(torch.zeros(ROWS, COLUMNS), requires_grad=False)
        linear.weight_scale_inv = nn.Parameter(torch.zeros(2, 3), requires_grad=False)
        linear.bias = nn.Parameter(torch.zeros(ROWS), requires_grad=False)
        linear.skip_bias_add = False
        linear.quant_method = method()
        parent, _, short = name.partition(".")
        parts[parent].add_module(short, linear)
    return nn.ModuleDict(parts)


class FakePool:
    """Views as a pool gives them: each local layer and each slot of the ring has bytes of its own."""

    def __init__(self, layers: Sequence[LayerSpec]) -> None:
        self.layers = tuple(layers)
        self._slots = {place: torch.zeros(layers[0].num_bytes, dtype=torch.uint8) for place in (*LOCAL, "ring")}

    def is_local(self, layer: int) -> bool:
        return layer in LOCAL

    def layer_view(self, layer: int) -> dict[str, torch.Tensor]:
        return _torch.tensor_views(self._slots[layer], self.layers[layer])  # type: ignore[arg-type]

    def ring_view(self, layer: int) -> dict[str, torch.Tensor]:
        return _torch.tensor_views(self._slots["ring"], self.layers[layer])  # type: ignore[arg-type]


class Filled:
    """A model of some layers on a pool, each filled with its number plus two, scales of two and biases of 100."""

    def __init__(self, method: Callable[[], Any] = Halved) -> None:
        self.offloader = PoolOffloader(LAYERS)
        self.blocks = self.offloader.wrap_modules(block(method) for _ in range(LAYERS))
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(self.blocks)
        self.loaded: list[int] = []

    def load(self, layer: int) -> None:
        self.loaded.append(layer)
        for linear in pooled_linears(self.blocks[layer]).values():
            assert not linear.weight_scale_inv.any(), "a loader finds what no layer before has left"
            linear.weight.data.fill_(layer + 2)
            linear.weight_scale_inv.data.fill_(2)
            linear.bias.data.fill_(100)

    def fill(self) -> FakePool:
        pool: Any = self.offloader.fill(FakePool, self.load)  # type: ignore[arg-type]
        assert isinstance(pool, FakePool)
        return pool

    def finish_as_vllm_does(self) -> None:
        config: Any = SimpleNamespace(
            quantization="fp8", dtype=torch.float32, word_embeddings_untied_by_checkpoint=False
        )
        process_weights_after_loading(self.model, config, torch.device("cpu"))


def test_layers_are_built_in_the_memory_of_one() -> None:
    places: set[int] = set()

    def built() -> Iterator[nn.Module]:
        for _ in range(LAYERS):
            made = block(Halved)
            places.update(value.data_ptr() for value in made.parameters())
            yield made

    blocks = PoolOffloader(LAYERS).wrap_modules(built())
    assert len({value.data_ptr() for made in blocks for value in made.parameters()}) == 3 * len(LINEARS)
    assert len(places) > 3 * len(LINEARS), "they would have been where they are in any case"


@pytest.mark.parametrize("method", [Halved, HalvedInPlace])
def test_what_a_method_leaves_is_pooled_and_processed_once(method: type) -> None:
    filled = Filled(method)
    pool = filled.fill()
    filled.finish_as_vllm_does()
    filled.offloader.give_methods_back()
    assert filled.loaded == list(LOCAL)
    spec = pool.layers[0].tensor("layers.0.mlp.down_proj.weight")
    assert (spec.shape, spec.strides) == ((COLUMNS, ROWS), (1, COLUMNS))
    assert pool.layers[0].tensor("layers.0.mlp.down_proj.weight_scale").shape == ()
    assert len(pool.layers[0].tensors) == 3 * len(LINEARS)
    for layer, made in enumerate(filled.blocks):
        views = pool.layer_view(layer) if layer in LOCAL else pool.ring_view(layer)
        for name, linear in pooled_linears(made).items():
            assert linear.weight.data_ptr() == views[f"layers.{layer}.{name}.weight"].data_ptr()
            assert isinstance(linear.quant_method, Halved)
            assert linear.padding == 17
            y = apply(linear, linear.quant_method, torch.ones(1, COLUMNS))
            assert torch.equal(y, torch.full((1, ROWS), (layer + 2.0) * COLUMNS + 100 if layer in LOCAL else 0.0))


def test_an_op_computes_what_the_method_does_on_another_layers_tensors() -> None:
    filled = Filled()
    pool = filled.fill()
    filled.offloader.give_methods_back()
    linears = pooled_linears(filled.blocks[0])
    names = {t.name.removeprefix("layers.2."): t.name for t in pool.layers[2].tensors}
    views = pool.layer_view(2)
    other = stand_ins(linears, {short: views[name] for short, name in names.items()})["mlp.down_proj"]
    assert torch.equal(apply(other, Halved(), torch.ones(1, COLUMNS)), torch.full((1, ROWS), 4.0 * COLUMNS + 100))
    assert linears["mlp.down_proj"].weight.data_ptr() == pool.layer_view(0)["layers.0.mlp.down_proj.weight"].data_ptr()
    assert kernels_of({"mlp.down_proj": other}) == "mlp.down_proj Halved()"


class KeepsAWorkspace(Halved):
    def more(self, layer: Any) -> None:
        layer.workspace = torch.zeros(3)


class PacksInItsKernel(Halved):
    def more(self, layer: Any) -> None:
        self.kernel = SimpleNamespace(packed=layer.weight.clone())


class PacksInside(Halved):
    def more(self, layer: Any) -> None:
        layer.packed = nn.Linear(2, 2)


class KeepsWeights(Halved):
    def more(self, layer: Any) -> None:
        self.handler, layer.weight = layer.weight, None


class ChoosesByWeights(Halved):
    def more(self, layer: Any) -> None:
        layer.scale = float(layer.weight_scale)


class ShapesByWeights(Halved):
    def more(self, layer: Any) -> None:
        if layer.weight_scale > 1:
            layer.weight = nn.Parameter(layer.weight.t().contiguous(), requires_grad=False)


class PadsStrides(Halved):
    def more(self, layer: Any) -> None:
        layer.weight = nn.Parameter(torch.zeros(ROWS, COLUMNS + 2)[:, :COLUMNS], requires_grad=False)


class QuantisesOnline(Halved):
    uses_meta_device = True


@pytest.mark.parametrize(
    ("method", "words", "before_the_pool"),
    [
        (KeepsAWorkspace, r"KeepsAWorkspace\(\) puts workspace beside the parameters of self_attn\.qkv_proj", True),
        (PacksInside, "puts packed beside the parameters", True),
        (PacksInItsKernel, "puts its method's kernel.packed beside the parameters", True),
        (KeepsWeights, "keeps the weights of self_attn.qkv_proj to itself", True),
        (PadsStrides, "cannot hold: tensor 'self_attn.qkv_proj.weight': strides", True),
        (QuantisesOnline, "quantises while it loads: give a checkpoint that is fp8", True),
        (ChoosesByWeights, r"mlp\.down_proj\.scale, .* of decoder layer 1 is not as of every layer", False),
        (ShapesByWeights, r"mlp\.down_proj\.weight, .* of decoder layer 0 is not as of every layer", False),
        (object, "is a LinearBase with object; pooled are", True),
    ],
)
def test_what_a_pool_cannot_serve(method: type, words: str, before_the_pool: bool) -> None:
    made: list[FakePool] = []

    def make(layers: Sequence[LayerSpec]) -> Any:
        made.append(FakePool(layers))
        return made[0]

    def start() -> None:
        filled = Filled(method)
        filled.offloader.fill(make, filled.load)

    with pytest.raises(UnsupportedError, match=words):
        start()
    assert bool(made) != before_the_pool


def test_buffers_of_a_linear_are_refused_by_name() -> None:
    made: Any = block(Halved)
    made.get_submodule("mlp.down_proj").register_buffer("table", torch.zeros(2))
    with pytest.raises(UnsupportedError, match=r"mlp\.down_proj\.table of a decoder layer are buffers"):
        PoolOffloader(1).wrap_modules(iter([made]))


def test_a_checkpoint_of_more_layers_is_another_models(tmp_path: Path) -> None:
    save_file({"model.layers.2.self_attn.q_proj.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    weights.StoredWeights(None, str(tmp_path), 3)
    with pytest.raises(CheckpointError, match=r"has 'model\.layers\.2\.self_attn\.q_proj\.weight', the model has 2"):
        weights.StoredWeights(None, str(tmp_path), 2)


def test_a_layer_that_moved_off_the_pool_is_named() -> None:
    filled = Filled()
    filled.fill()
    linear: Any = filled.blocks[1].get_submodule("mlp.down_proj")
    linear.weight = nn.Parameter(linear.weight.clone(), requires_grad=False)
    with pytest.raises(UnsupportedError, match=r"vLLM replaced mlp\.down_proj\.weight of layer 1"):
        filled.offloader.give_methods_back()


def test_rows_that_share_a_scale_are_refused_in_cas() -> None:
    def method(static: bool, per_tensor: bool) -> Any:
        scale = SimpleNamespace(static=static, group_shape=SimpleNamespace(is_per_tensor=lambda: per_tensor))
        return SimpleNamespace(activation_quant_key=SimpleNamespace(scale=scale))

    for accepted in (object(), method(True, True), method(False, False)):
        compat.check_token_wise("mlp.down_proj", accepted)
    with pytest.raises(UnsupportedError, match=r"mlp\.down_proj .* use mode 'was'"):
        compat.check_token_wise("mlp.down_proj", method(False, True))


def test_made_up_fp8_weights_have_scales_above_zero() -> None:
    names = {
        "mlp.down_proj.weight": torch.empty(64, 32, dtype=torch.float8_e4m3fn),
        "mlp.down_proj.weight_scale_inv": torch.full((2, 1), -1.0),
        "mlp.down_proj.input_scale": torch.tensor(float("nan")),
    }
    made = {name: nn.Parameter(value, requires_grad=False) for name, value in names.items()}
    weights.MadeUpWeights().fill(0, made)
    weight, *scales = (value.float() for value in made.values())
    assert weight.isfinite().all()
    assert 0.9 < float(weight.std()) < 1.1
    assert all(float(value.min()) >= 0.02 and float(value.max()) <= 0.03 for value in scales)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.self_attn.q_proj.weight", 3),
        ("model.layers.12.mlp.gate_up_proj.weight_scale_inv", 12),
        ("model.layers.0.mlp.down_proj.input_scale", 0),
        ("model.layers.3.self_attn.k_proj.k_scale", None),  # of the KV cache: every rank needs them
        ("model.layers.3.self_attn.k_proj.output_scale", None),
        ("model.layers.3.self_attn.q_norm.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_stored_tensors_that_only_their_layers_owner_reads(name: str, layer: int | None) -> None:
    stored = weights._STORED.search(name)
    assert (stored and int(stored[1])) == layer


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_put_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    """Where vLLM's method is torch's own product, by torch, else by a copy: the same numbers."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.platforms import current_platform

    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)  # which has a product of its own
    method = UnquantizedLinearMethod()
    assert compat.is_torchs_product(method)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert not compat.is_torchs_product(method)
    monkeypatch.delenv("VLLM_BATCH_INVARIANT")
    assert not compat.is_torchs_product(type("Other", (UnquantizedLinearMethod,), {})())

    linear: Any = SimpleNamespace(
        weight=torch.randn(6, 4), bias=torch.randn(6) if bias else None, skip_bias_add=False, quant_method=method
    )
    x, applied = torch.randn(3, 4), []
    expected = nn.functional.linear(x, linear.weight, linear.bias)

    def noted(layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        applied.append(layer)
        return nn.functional.linear(x, layer.weight, bias)

    monkeypatch.setattr(method, "apply", noted)
    for is_torchs in (True, False):
        monkeypatch.setattr(compat, "is_torchs_product", lambda method, answer=is_torchs: answer)
        product, out = product_of(linear), torch.zeros(3, 6)
        assert product(x, out) is out
        assert torch.equal(out, expected)
        assert bool(applied) == (not is_torchs)
        assert torch.equal(product(x), expected)
        applied.clear()
