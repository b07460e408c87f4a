"""Importing this imports vLLM without its warnings, which the tests' settings would make errors."""

from __future__ import annotations

import importlib
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name in (
        "vllm.config",
        "vllm.forward_context",
        "vllm.model_executor.models.utils",
        "vllm.v1.worker.gpu_worker",
        "sidp_runtime.integrations.vllm.loader",
    ):
        importlib.import_module(name)
