"""What stops an engine with a pool from starting: other versions, changed hooks, settings that a pool cannot serve."""

from __future__ import annotations

import contextlib
import functools
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm runs these tests where it is")

import helpers.vllm_quiet  # noqa: F401 - before the others
import vllm
from helpers.vllm_settings import plain_settings

from sidp_runtime import config
from sidp_runtime.errors import ConfigError, UnsupportedError, UsageError
from sidp_runtime.integrations.vllm import compat, engine, engine_arguments, register, settings, weights
from sidp_runtime.integrations.vllm.loader import SidpModelLoader, row_buckets
from sidp_runtime.integrations.vllm.offloader import PoolOffloader
from sidp_runtime.integrations.vllm.step import OPERATORS


def configured(additional: Any, extra: Any = None, index: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        additional_config=additional,
        load_config=SimpleNamespace(model_loader_extra_config=extra),
        parallel_config=SimpleNamespace(data_parallel_index=index),
    )


def test_the_installed_version_has_every_hook() -> None:
    compat.check_hooks()
    SidpModelLoader(SimpleNamespace(model_loader_extra_config={}))


@pytest.mark.parametrize("version", ["0.19.1", "0.34.0", "1.0.0", "dev"])
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(UnsupportedError, match=rf"vLLM {version} is not between 0\.20 and 0\.33"):
        SidpModelLoader(SimpleNamespace(model_loader_extra_config={}))


def test_a_changed_hook_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.models import utils

    monkeypatch.setattr(utils, "make_layers", lambda layer_fn, num_hidden_layers: None)
    with pytest.raises(UnsupportedError, match=r"models\.utils\.make_layers takes \(layer_fn, num_hidden_layers\)"):
        compat.check_hooks()


def test_a_missing_hook_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.offloader.base import BaseOffloader

    monkeypatch.delattr(BaseOffloader, "wrap_modules")
    with pytest.raises(
        UnsupportedError, match=r"has no vllm\.model_executor\.offloader\.base\.BaseOffloader\.wrap_mod"
    ):
        compat.check_hooks()


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_plain_settings_are_taken(quantization: str | None) -> None:
    given = plain_settings()
    given.model_config.quantization = quantization
    if quantization is not None:
        given.quant_config = SimpleNamespace(is_checkpoint_fp8_serialized=True)
    compat.check_settings(given)


@pytest.mark.parametrize(
    ("part", "name", "value", "words"),
    [
        ("parallel_config", "tensor_parallel_size", 2, "tensor_parallel_size"),
        ("parallel_config", "pipeline_parallel_size", 2, "pipeline_parallel_size"),
        ("parallel_config", "data_parallel_size", 2, "lock-step"),
        ("parallel_config", "enable_dbo", True, "enable_dbo"),
        ("model_config", "quantization", "awq", "'awq': give a checkpoint that is fp8, bf16"),
        ("", "quant_config", SimpleNamespace(is_checkpoint_fp8_serialized=False), "quantised while they are loaded"),
        ("model_config", "enable_sleep_mode", True, "sleep mode"),
        ("", "lora_config", object(), "LoRA"),
        ("", "speculative_config", object(), "speculative"),
        ("compilation_config", "mode", 1, "STOCK_TORCH_COMPILE"),
    ],
)
def test_settings_that_a_pool_cannot_serve(part: str, name: str, value: Any, words: str) -> None:
    given = plain_settings()
    setattr(getattr(given, part) if part else given, name, value)
    with pytest.raises(UnsupportedError, match=words):
        compat.check_settings(given)


@pytest.mark.parametrize(
    ("cpu", "backend", "words"),
    [
        (True, "host", ""),
        (False, "nvshmem", ""),
        (False, "host", "backend 'host' with vLLM on GPUs"),
        (True, "nvshmem", "backend 'nvshmem' with vLLM on a CPU"),
    ],
)
def test_the_backend_is_the_platforms(monkeypatch: pytest.MonkeyPatch, cpu: bool, backend: str, words: str) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(current_platform, "is_cpu", lambda: cpu)
    with pytest.raises(UnsupportedError, match=words) if words else contextlib.nullcontext():
        compat.check_backend(backend)


def test_kernels_are_loaded_early_for_cas_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    for mode, expected in (("was", None), ("cas", "EAGER"), ("auto", "EAGER")):
        monkeypatch.delenv("CUDA_MODULE_LOADING", raising=False)
        register()  # in every process of every vLLM: it changes nothing
        assert "CUDA_MODULE_LOADING" not in os.environ
        engine_arguments(mode=mode, backend="nvshmem")
        assert os.environ.get("CUDA_MODULE_LOADING") == expected
        refused = pytest.raises(ConfigError, match="CUDA_MODULE_LOADING=EAGER in the environment")
        with contextlib.nullcontext() if expected else refused:
            config.check_kernels_early()


def test_another_worker_would_never_end_the_warm_up() -> None:
    chosen = engine_arguments()["worker_cls"]
    for name in (chosen, "vllm.v1.worker.gpu_worker.Worker", "auto"):
        given = SimpleNamespace(parallel_config=SimpleNamespace(worker_cls=name))
        with contextlib.nullcontext() if name == chosen else pytest.raises(UnsupportedError, match="worker_cls"):
            compat.check_worker(given)


def test_kernels_that_vllm_compiles_in_mid_run_are_loaded_before_it() -> None:
    lengths: list[int] = []

    def note(num_reqs: int, starts: torch.Tensor, positions: torch.Tensor) -> None:
        assert starts.tolist() == [0, 0], "a request of no tokens"
        lengths.append(positions.shape[0])

    table = SimpleNamespace(compute_slot_mapping=note)
    starts = SimpleNamespace(gpu=torch.arange(9, dtype=torch.int32))
    for room, expected in ((1024, [1, 16, 17]), (16, [1, 16])):
        lengths.clear()
        positions = torch.zeros(room, dtype=torch.int64)
        runner = SimpleNamespace(
            input_batch=SimpleNamespace(block_table=table), positions=positions, query_start_loc=starts
        )
        compat.load_late_kernels(runner)
        assert lengths == expected
    compat.load_late_kernels(SimpleNamespace(positions=positions))  # of another vLLM


def test_piecewise_graphs_end_at_the_operators() -> None:
    given = plain_settings()
    for _ in range(2):
        compat.split_graphs_at(given, OPERATORS)
    assert given.compilation_config.splitting_ops == ["vllm::attention", *OPERATORS]


@pytest.mark.parametrize("nothing", [None, []])
def test_piecewise_graphs_that_are_not_cut_would_capture_the_operators(nothing: Any) -> None:
    from vllm.config import CUDAGraphMode

    given = plain_settings()
    given.compilation_config.splitting_ops = nothing
    with pytest.raises(UnsupportedError, match="not cut at splitting_ops"):
        compat.split_graphs_at(given, OPERATORS)
    given.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    compat.split_graphs_at(given, OPERATORS)


def test_owners_capture_only_row_counts_that_occur() -> None:
    captured = [1, 2, 4, *range(8, 513, 8)]
    assert row_buckets(256, captured) == [1, 2, 4, 8, 16, 32, 64, 128, 160, 192, 224, 256]
    assert row_buckets(256, [*captured[:19], 192, 256]) == [1, 2, 4, 8, 16, 32, 64, 128, 192, 256]
    assert row_buckets(256, [8, 24, 72]) == [8, 24, 72, 256]
    assert row_buckets(200, [512]) == [200]
    assert row_buckets(1, captured) == [1]
    given = plain_settings()
    given.compilation_config.cudagraph_capture_sizes = [8, 1]
    assert compat.captured_rows(given) == [1, 8]
    given.compilation_config.cudagraph_mode = vllm.config.CUDAGraphMode.NONE
    assert compat.captured_rows(given) == []


@pytest.mark.parametrize("second_runner", [True, False])
def test_an_engine_with_cas_and_graphs_on_gpus_is_taken(monkeypatch: pytest.MonkeyPatch, second_runner: bool) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(second_runner)))
    arguments = engine_arguments(rank=0, store="h:1", world_size=2, backend="nvshmem", mode="cas")
    given = plain_settings()
    mode = vllm.config.CUDAGraphMode[arguments["compilation_config"]["cudagraph_mode"]]
    assert mode.has_piecewise_cudagraphs()
    assert mode.has_full_cudagraphs() == (not second_runner)
    given.compilation_config.cudagraph_mode = mode
    given.parallel_config.worker_cls = arguments["worker_cls"]
    given.parallel_config.data_parallel_index = 0
    given.additional_config = arguments["additional_config"]
    given.load_config = SimpleNamespace(model_loader_extra_config=arguments["model_loader_extra_config"])
    compat.check_settings(given)
    pool = settings.read(given).pool
    compat.check_backend(pool.backend)
    compat.check_worker(given)
    compat.split_graphs_at(given, OPERATORS)
    assert "sidp::vllm_compute" in given.compilation_config.splitting_ops
    settings.key_graphs(given, pool)
    assert given.additional_config["sidp_graph"]["computes"]


def test_the_compile_cache_tells_graphs_apart_whatever_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(pool: dict[str, Any], version: int = settings.OPS_VERSION, **others: Any) -> str:
        monkeypatch.setattr(settings, "OPS_VERSION", version)
        given = vllm.config.VllmConfig(additional_config={"sidp": pool, **others})
        settings.key_graphs(given, settings.PoolSettings(**pool))
        return str(given.compute_hash())

    plain = str(vllm.config.VllmConfig().compute_hash())
    keep = {"resident_layers": [1, 3]}
    assert len({plain, key({}), key({"mode": "was"}), key(keep), key({}, version=99), key({}, other_plugin=1)}) == 6
    assert key(keep) == key({"resident_layers": [3, 1]})
    for pool in ({"mode": "cas"}, {"max_rows": 64, "ring_slots": 3, "world_size": 4}):
        assert key(pool) == key({}), "shapes no graph"
    monkeypatch.setattr(settings, "PoolSettings", functools.partial(settings.PoolSettings, mode="was"))
    shapes = key({})  # as if another version had another default
    monkeypatch.undo()
    assert shapes != key({})


def test_without_an_entry_in_additional_config_the_compile_cache_would_mix() -> None:
    for additional in (None, {}, {"other": {}}):
        with pytest.raises(ConfigError, match="compile cache"):
            settings.read(configured(additional))


def test_settings_from_both_places() -> None:
    given = engine_arguments(rank=1, store="10.0.0.1:2960", world_size=3, mode="was", own={"token": "ab"})
    read = settings.read(configured(given["additional_config"], given["model_loader_extra_config"]))
    assert (read.rank, read.world_size, read.host, read.port) == (1, 3, "10.0.0.1", 2960)
    assert (read.pool.mode, read.own.token) == ("was", "ab")
    assert given["additional_config"] == {"sidp": {"world_size": 3, "mode": "was"}}  # nothing of the rank in the key


def test_the_rank_of_an_engine_that_vllm_started() -> None:
    read = settings.read(configured({"sidp": {"world_size": 3}}, {"store": "h:1"}, index=2))
    assert read.rank == 2


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "77"}.items():
        monkeypatch.setenv(name, value)
    read = settings.read(configured({"sidp": {}}))
    assert (read.rank, read.world_size, read.host, read.port) == (1, 2, "h", 77)
    monkeypatch.delenv("RANK")
    with pytest.raises(ConfigError, match=r"rank, world_size, store not given in the settings, and .*RANK"):
        settings.read(configured({"sidp": {}}))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"mode": "fast"}, "mode 'fast'"),
        ({"weights": "some"}, "weights 'some'"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"slots": 2}, "unknown keys slots"),
        ({"world_size": 2}, "rank 5 is not one of 0 to 1"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings.read(configured({"sidp": {"world_size": 9, **wrong}}, {"rank": 5, "store": "h:1"}))


@pytest.mark.parametrize("store", ["h", "h:", ":1", "h:0", "h:99999"])
def test_a_store_is_host_and_port(store: str) -> None:
    with pytest.raises(ConfigError, match="is not host:port"):
        settings.read(configured({"sidp": {"world_size": 2}}, {"rank": 0, "store": store}))


def test_layers_of_another_form_are_refused() -> None:
    offloader = PoolOffloader(1)
    with pytest.raises(UnsupportedError, match=r"a Linear has no self_attn\.qkv_proj"):
        offloader.wrap_modules(layer for layer in [torch.nn.Linear(2, 2)])


def test_an_mlp_is_not_computed_by_what_vllm_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
    from vllm.platforms import current_platform

    with set_current_vllm_config(vllm.config.VllmConfig()):
        silu, gelu = SiluAndMul(), GeluAndMul()
    x = torch.randn(3, 8)
    silu._forward_method = None  # of the compiled kind, where vLLM chose that
    assert torch.equal(compat.activation_of(silu)(x), torch.nn.functional.silu(x[:, :4]) * x[:, 4:])
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    assert compat.activation_of(silu) == silu.forward_cuda
    assert compat.activation_of(gelu) is gelu


def test_made_up_weights_depend_on_their_names_alone() -> None:
    def model() -> torch.nn.Module:
        return torch.nn.ModuleDict({name: torch.nn.Linear(8, 8, bias=False) for name in ("first", "second")})

    one, other = dict(model().named_parameters()), dict(model().named_parameters())
    weights.MadeUpWeights().fill(None, one)
    weights.MadeUpWeights().fill(0, {"second.weight": other["second.weight"]})
    assert not torch.equal(one["first.weight"], one["second.weight"])
    assert torch.equal(one["second.weight"], other["second.weight"])
    assert not torch.equal(one["first.weight"], other["first.weight"])


def test_plain_engines_of_the_benchmark_have_the_weights_that_a_pool_makes_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import LoadConfig
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
    from vllm.model_executor.model_loader import get_model_loader

    from bench import vllm_engine

    given: dict[str, Any] = {}
    monkeypatch.setattr("vllm.LLM", lambda **arguments: given.update(arguments))
    vllm_engine._start({"model": "m", "system": "dp", "replicas": 2, "weights": "dummy", "engine": {}}, pooled=False)
    assert compat._find(*given["worker_extension_cls"].rsplit(".", 1), "any")
    loader = get_model_loader(LoadConfig(load_format=given["load_format"]))
    model = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8, bias=False) for name in ("first", "second")})
    model["attention"] = torch.nn.Module()
    model["attention"].k_scale = torch.nn.Parameter(torch.tensor(-1.0))  # a pool leaves it to vLLM
    model["attention"].quant_method = BaseKVCacheMethod(SimpleNamespace())
    expected = {name: torch.empty_like(value) for name, value in model.named_parameters() if value.dim()}
    weights.MadeUpWeights().fill(0, expected)
    expected["attention.k_scale"] = torch.tensor(-1.0)
    loader.load_weights(model, None)
    assert all(torch.equal(value, expected[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize(
    ("steps", "moved", "fetches", "asked", "used"),
    [
        ({"was": 3}, 10, 6, 0, True),
        ({"was": 3}, 0, 0, 0, False),
        ({"was": 3}, 10, 0, 0, False),  # the ring was filled once, at the start
        ({"cas": 3}, 10, 0, 0, False),
        ({"cas": 3}, 10, 0, 9, True),
        ({}, 0, 0, 0, True),
    ],
)
def test_a_pool_that_was_not_used_is_an_error(
    steps: dict[str, int], moved: int, fetches: int, asked: int, used: bool
) -> None:
    stats = {
        "steps": steps,
        "bytes_by_peer": [0, moved],
        "fetches": fetches,
        "requests_by_peer": [0, asked],
        "fallbacks": 0,
    }
    engine.check_used(stats, 0)  # nothing is streamed: nothing to use
    if used:
        engine.check_used(stats, 2)
    else:
        with pytest.raises(UsageError, match="configured and not used"):
            engine.check_used(stats, 2)
