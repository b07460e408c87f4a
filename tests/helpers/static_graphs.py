"""A backend for torch.compile that treats graphs as vLLM's piecewise CUDA graphs do, with no GPU.

The graph is cut by vLLM's own ``split_graph``. A piece that is "captured" runs anew in each step, but as a replay does:
its inputs must lie where they lay at its first run with as many rows, and its outputs are put where they were put then.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from sidp_runtime import Mode
from sidp_runtime.integrations.vllm.engine import current
from sidp_runtime.integrations.vllm.step import OPERATORS

#: Where vLLM cuts by itself, and the operators of the pool.
SPLITTING_OPS = ["vllm::unified_attention_with_output", "vllm::unified_kv_cache_update", *OPERATORS]

#: Operators that ran between pieces, and what pieces did.
seen: Counter[str] = Counter()


def report(worker: Any) -> tuple[Counter[str], list[str], dict[str, Any]]:
    """For ``collective_rpc``: what was ``seen``, where vLLM would have cut, and what keys its compile cache."""
    config = worker.vllm_config
    return seen, config.compilation_config.splitting_ops, config.additional_config


def fixed_mode(worker: Any) -> Mode | None:
    """For ``collective_rpc``: of the engine's policy."""
    return current().runtime.policy.fixed_mode


class Piece:
    """Stands where vLLM's ``CUDAGraphWrapper`` would."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        self._graph = graph
        self._captured: dict[Any, tuple[list[int], tuple[torch.Tensor, ...]]] = {}

    def __call__(self, *inputs: Any) -> Any:
        tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
        rows = tuple(tuple(tensor.shape) for tensor in tensors)
        addresses = [tensor.data_ptr() for tensor in tensors]
        results = self._graph(*inputs)
        given = results if isinstance(results, tuple) else (results,)
        if rows not in self._captured:
            self._captured[rows] = (addresses, given)
            seen["captured"] += 1
            return results
        expected, outputs = self._captured[rows]
        assert addresses == expected, "a captured piece would read where its inputs lay in another step"
        for output, result in zip(outputs, given, strict=True):
            output.copy_(result)
        seen["replayed"] += 1
        return outputs if isinstance(results, tuple) else outputs[0]


def split(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
    """The backend; see ``CONFIG``."""
    from vllm.compilation.backends import split_graph

    whole, pieces = split_graph(graph, SPLITTING_OPS)
    for item in pieces:
        if not item.is_splitting_graph:
            delattr(whole, item.submod_name)
            whole.__dict__[item.submod_name] = Piece(item.graph)
            continue
        seen.update(str(node.target) for node in item.graph.graph.nodes if node.op == "call_function")
    return whole


#: For ``LLM``, and its process; the same kernels as without a graph.
CONFIG: dict[str, Any] = {
    "mode": 2,
    "backend": "helpers.static_graphs.split",
    "splitting_ops": SPLITTING_OPS[:2],
    "custom_ops": ["all"],
}
ENVIRONMENT = {"VLLM_USE_AOT_COMPILE": "0", "VLLM_LOGGING_LEVEL": "DEBUG"}
