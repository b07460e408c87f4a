"""vLLM's workers with one difference: all engines of the group report the same KV budget, the smallest.

Else the fullest engine would be the first to preempt, and equal shares of the prompts would not end together.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from .engine import current


class SidpWorker(Worker):  # type: ignore[misc]
    """For ``worker_cls`` on GPUs."""

    def determine_available_memory(self) -> int:
        return current().smallest_budget(int(super().determine_available_memory()))


def __getattr__(name: str) -> Any:
    """``SidpCpuWorker``, made when it is asked for: importing vLLM's CPU worker changes the process."""
    if name != "SidpCpuWorker":
        raise AttributeError(name)
    from vllm.v1.worker.cpu_worker import CPUWorker

    class SidpCpuWorker(CPUWorker):  # type: ignore[misc]
        """For ``worker_cls`` on a CPU."""

        def determine_available_memory(self) -> int:
            return current().smallest_budget(int(super().determine_available_memory()))

    globals()[name] = SidpCpuWorker
    return SidpCpuWorker
