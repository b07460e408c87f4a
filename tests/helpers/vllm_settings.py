"""What of vLLM's settings the gates look at, of an engine that a pool serves."""

from __future__ import annotations

from types import SimpleNamespace


def plain_settings() -> SimpleNamespace:
    from vllm.config import CompilationMode, CUDAGraphMode

    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1, enable_dbo=False
        ),
        model_config=SimpleNamespace(quantization=None, enable_sleep_mode=False),
        quant_config=None,
        lora_config=None,
        speculative_config=None,
        compilation_config=SimpleNamespace(
            mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=CUDAGraphMode.PIECEWISE, splitting_ops=["vllm::attention"]
        ),
    )
