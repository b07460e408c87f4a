"""vLLM on one shared copy of the weights: independent engines, unchanged but for ``load_format="sidp"``.

    LLM(model=folder, **engine_arguments(rank=rank, world_size=2, store="127.0.0.1:29600"))

The plugin is found by its entry point (``vllm.general_plugins``) in every process of an engine. See docs/vllm.md.
"""

from __future__ import annotations

from typing import Any

__all__ = ["engine_arguments", "register"]


def register() -> None:
    """Entry point: makes ``load_format="sidp"`` known. Called in every process of vLLM, maybe more than once.

    It checks and changes nothing else, as it also runs where no pool is wanted; the loader checks when it is made.
    """
    from vllm.model_executor.model_loader import register_model_loader

    from .loader import SidpModelLoader

    register_model_loader("sidp")(SidpModelLoader)


def engine_arguments(
    *, rank: int | None = None, store: str | None = None, own: dict[str, Any] | None = None, **pool: Any
) -> dict[str, Any]:
    """Keyword arguments for ``vllm.LLM`` or ``EngineArgs``.

    ``rank`` and ``store`` (``host:port``; rank 0 serves it) and what else is this engine's ``own``: see
    ``settings.RankSettings``. ``pool``: equal on all ranks, see ``settings.PoolSettings``. On a GPU it asks for
    CUDA graphs, of whole steps too unless vLLM may take its second model runner; put ``cudagraph_mode`` into a
    ``compilation_config`` of your own. There, unless the mode is ``was``, it also sets ``CUDA_MODULE_LOADING`` for this
    process and its children, see ``config.load_kernels_early``.
    """
    from vllm.platforms import current_platform

    from ... import config
    from . import compat
    from .settings import PoolSettings, RankSettings

    given = {"rank": rank, "store": store, **(own or {})}
    given = {name: value for name, value in given.items() if value is not None}
    mode = PoolSettings(**pool).mode  # refuses unknown names here, not in another process
    RankSettings(**given)
    on_cpu = current_platform.is_cpu()
    if not on_cpu and mode != "was":
        config.load_kernels_early()
    worker = "SidpCpuWorker" if on_cpu else "SidpWorker"
    graphs = {} if on_cpu else {"compilation_config": {"cudagraph_mode": compat.default_graphs()}}
    return {
        **graphs,
        "load_format": "sidp",
        "model_loader_extra_config": given,
        "additional_config": {"sidp": pool},
        "worker_cls": f"{__name__}.worker.{worker}",
        "worker_extension_cls": f"{__name__}.engine.WorkerExtension",
    }
