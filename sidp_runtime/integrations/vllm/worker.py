"""vLLM's workers with two differences: all engines report the same KV budget, and they warm up together.

With unequal budgets the fullest engine would be the first to preempt, and equal shares of the prompts would not end
together. Until all are warm no engine asks another for anything: what captures or compiles may not answer in time.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from . import compat
from .engine import current


class PooledWorker:
    """The differences."""

    def determine_available_memory(self) -> int:
        """vLLM's figure, the smallest of all engines. Collective."""
        return current().smallest_budget(int(super().determine_available_memory()))  # type: ignore[misc]

    def compile_or_warm_up_model(self) -> Any:
        """Collective. Steps are WaS and teach the policy nothing until it returns."""
        result = super().compile_or_warm_up_model()  # type: ignore[misc]
        self._warm_up_more()
        current().end_warm_up()
        return result

    def _warm_up_more(self) -> None:
        """What vLLM leaves to the first steps."""


class SidpWorker(PooledWorker, Worker):  # type: ignore[misc]
    """For ``worker_cls`` on GPUs."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's; launches of full CUDA graphs become steps."""
        super().load_model(*args, **kwargs)
        if self.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
            compat.step_through_graphs(self.model_runner, current().state.launch)

    def _warm_up_more(self) -> None:
        compat.load_late_kernels(self.model_runner)
        compat.load_kernels_of_logits(self)
        with current().state.own_methods():
            compat.warm_up_products(self)


def __getattr__(name: str) -> Any:
    """``SidpCpuWorker``, made when it is asked for: importing vLLM's CPU worker changes the process."""
    if name != "SidpCpuWorker":
        raise AttributeError(name)
    from vllm.v1.worker.cpu_worker import CPUWorker

    class SidpCpuWorker(PooledWorker, CPUWorker):  # type: ignore[misc]
        """For ``worker_cls`` on a CPU."""

    globals()[name] = SidpCpuWorker
    return SidpCpuWorker
