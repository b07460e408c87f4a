"""CUDA graphs of whole steps: which engines may have them, and how vLLM's own wrapper captures and launches them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm runs these tests where it is")

import helpers.vllm_quiet  # noqa: F401 - before the others
import vllm
import vllm.envs
from helpers.noting_runtime import Began, Gpu
from helpers.vllm_settings import plain_settings

from sidp_runtime import Mode
from sidp_runtime._C import StepKind
from sidp_runtime.errors import UnsupportedError
from sidp_runtime.integrations.vllm import compat
from sidp_runtime.integrations.vllm.loader import install
from sidp_runtime.integrations.vllm.step import StepState


@pytest.mark.parametrize("name", ["FULL", "FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"])
def test_full_cuda_graphs_need_the_first_model_runner(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from vllm.config import CUDAGraphMode

    given = plain_settings()
    given.compilation_config.cudagraph_mode = CUDAGraphMode[name]
    given.use_v2_model_runner = False
    compat.check_settings(given)
    given.use_v2_model_runner = True
    with pytest.raises(UnsupportedError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        compat.check_settings(given)
    del given.use_v2_model_runner  # of 0.20, where the environment says so
    for chosen in (False, True):
        monkeypatch.setattr(vllm.envs, "VLLM_USE_V2_MODEL_RUNNER", chosen, raising=False)
        with pytest.raises(UnsupportedError, match="VLLM_USE") if chosen else contextlib.nullcontext():
            compat.check_settings(given)


def test_vllm_says_which_whole_graph_is_next() -> None:
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor, set_forward_context

    assert compat.whole_graph() is None
    descriptor = BatchDescriptor(num_tokens=8)
    for mode, expected in ((CUDAGraphMode.FULL, descriptor), (CUDAGraphMode.PIECEWISE, None)):
        given = vllm.config.VllmConfig()
        with set_forward_context(None, given, cudagraph_runtime_mode=mode, batch_descriptor=descriptor):
            assert compat.whole_graph() == expected


def test_vllms_own_wrapper_captures_and_launches_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.compilation import cuda_graph
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor, set_forward_context

    runtime: Any = Began()
    gpu = Gpu(monkeypatch, runtime)

    @contextlib.contextmanager
    def capturing(*_: Any, **__: Any) -> Iterator[None]:
        gpu.capturing = True
        yield
        gpu.capturing = False

    graph = SimpleNamespace(replay=lambda: runtime.calls.append("launch"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(cuda_graph, "capture_pool", lambda pool, config: contextlib.nullcontext(pool), raising=False)
    for name, value in (
        ("validate_cudagraph_capturing_enabled", lambda: None),
        ("weak_ref_tensors", lambda x: x),
        ("current_stream", lambda: None),
        ("current_platform", SimpleNamespace(get_global_graph_pool=lambda: 0)),
        ("set_graph_pool_id", lambda pool: None),  # of 0.20
    ):
        monkeypatch.setattr(cuda_graph, name, value, raising=False)
    state = StepState(runtime, 0, max_rows=8, configured=Mode.WAS, first_is_was=True)
    model = torch.nn.Identity()
    install(model, [], state, with_computes=False)
    given = vllm.config.VllmConfig()
    runner = SimpleNamespace(model=cuda_graph.CUDAGraphWrapper(model, given, CUDAGraphMode.FULL))
    compat.step_through_graphs(runner, state.launch)
    assert isinstance(runner.model, cuda_graph.CUDAGraphWrapper)
    assert runner.model.unwrap() is model

    def step(mode: CUDAGraphMode) -> list[Any]:
        runtime.calls.clear()
        descriptor = BatchDescriptor(num_tokens=4)
        with set_forward_context(None, given, cudagraph_runtime_mode=mode, batch_descriptor=descriptor):
            assert runner.model(torch.zeros(4)).shape == (4,)
        return list(runtime.calls)

    captured = [(StepKind.CAPTURE, 4, Mode.WAS), "end"]
    begun = [(StepKind.REPLAY, 4, Mode.WAS), "check", "launch", "launched", "end"]
    assert step(CUDAGraphMode.NONE) == []
    assert step(CUDAGraphMode.FULL) == captured
    assert step(CUDAGraphMode.FULL) == ["wait", *begun, "wait"]
    runner.model.clear_graphs()  # vLLM measured them
    assert step(CUDAGraphMode.FULL) == captured
    state.warming_up = False
    assert step(CUDAGraphMode.FULL) == ["wait", *begun, "wait"]
    assert step(CUDAGraphMode.FULL) == begun
    assert step(CUDAGraphMode.PIECEWISE)[-2:] == [(StepKind.RUN, 4, Mode.WAS), "end"]
    with pytest.raises(UnsupportedError, match="in a SteppedGraphs, not a CUDAGraphWrapper"):
        compat.step_through_graphs(runner, state.launch)


@pytest.mark.parametrize("named", [True, False])
def test_deep_gemm_warms_up_linears_with_their_own_methods(monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    """vLLM 0.20's warm-up tells linears by their method, where an operator may stand."""
    from vllm.model_executor.warmup import deep_gemm_warmup
    from vllm.utils import deep_gemm

    from sidp_runtime.integrations.vllm import worker

    linear = SimpleNamespace(quant_method="operator")
    state = StepState(Began(), 2, max_rows=8)  # type: ignore[arg-type]
    state.methods.append((linear, "own"))
    seen: list[Any] = []
    monkeypatch.setattr(worker, "current", lambda: SimpleNamespace(state=state))
    monkeypatch.setattr(compat, "load_late_kernels", lambda runner: None)
    monkeypatch.setattr(compat, "load_kernels_of_logits", lambda worker: None)
    monkeypatch.setattr(deep_gemm, "is_deep_gemm_supported", lambda: True)
    monkeypatch.setattr(deep_gemm_warmup, "_fp8_linear_may_use_deep_gemm", None, raising=False)
    if not named:
        monkeypatch.delattr(deep_gemm_warmup, "_fp8_linear_may_use_deep_gemm")
    monkeypatch.setattr(
        deep_gemm_warmup, "deep_gemm_warmup", lambda model, tokens: seen.append((model, tokens, linear.quant_method))
    )
    given: Any = object.__new__(worker.SidpWorker)
    given.model_runner = None
    given.scheduler_config = SimpleNamespace(max_num_batched_tokens=64)
    monkeypatch.setattr(worker.SidpWorker, "get_model", lambda self: "model")
    given._warm_up_more()
    assert seen == ([("model", 64, "own")] if named else [])
    assert linear.quant_method == "operator"


def test_a_gpus_worker_steps_through_full_graphs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu_worker import Worker

    from sidp_runtime.integrations.vllm import worker

    followed: list[Any] = []
    monkeypatch.setattr(Worker, "load_model", lambda self, *, load_dummy_weights=False: None)
    monkeypatch.setattr(compat, "step_through_graphs", lambda *given: followed.append(given))
    monkeypatch.setattr(worker, "current", lambda: SimpleNamespace(state=SimpleNamespace(launch="launch")))
    for name, expected in (("PIECEWISE", []), ("FULL_DECODE_ONLY", [("runner", "launch")])):
        given: Any = object.__new__(worker.SidpWorker)
        given.vllm_config = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode[name]))
        given.model_runner = "runner"
        given.load_model(load_dummy_weights=False)
        assert followed == expected


def test_logits_are_computed_for_each_number_of_sequences_before_the_engine_is_warm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their product may load a kernel of its own for any of them, and a step of padded size says nothing of it."""
    from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

    from sidp_runtime.integrations.vllm import worker

    seen: list[Any] = []
    model: Any = object.__new__(Qwen3ForCausalLM)
    torch.nn.Module.__init__(model)
    model.lm_head = "head"
    model.logits_processor = lambda head, hidden: seen.append((head, hidden))
    monkeypatch.setattr(worker, "current", lambda: SimpleNamespace(state=StepState(Began(), 2, 8)))  # type: ignore[arg-type]
    monkeypatch.setattr(compat, "load_late_kernels", lambda runner: None)
    monkeypatch.setattr(compat, "warm_up_products", lambda worker: None)
    monkeypatch.setattr(worker.SidpWorker, "get_model", lambda self: model)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("waited"))
    given: Any = object.__new__(worker.SidpWorker)
    given.model_runner, given.device = None, "cpu"
    given.scheduler_config = SimpleNamespace(max_num_seqs=5)
    given.model_config = SimpleNamespace(get_hidden_size=lambda: 4, dtype=torch.bfloat16)
    given._warm_up_more()
    *computed, last = seen
    assert last == "waited"
    assert [(head, hidden.shape, hidden.dtype) for head, hidden in computed] == [
        ("head", (rows, 4), torch.bfloat16) for rows in (5, 4, 3, 2, 1)
    ]
