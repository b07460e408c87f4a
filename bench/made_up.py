"""vLLM's model loader "made-up": the weights that a pool makes up, in a plain engine.

vLLM's own dummies are within 0.001 of 0, norms too. How fast a GPU multiplies at its power limit depends on the
numbers, so systems are compared on the same ones (a GPU of a TP group makes up its part of a matrix by itself).
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from sidp_runtime.integrations.vllm import compat
from sidp_runtime.integrations.vllm.weights import MadeUpWeights

LOAD_FORMAT = "made-up"


@register_model_loader(LOAD_FORMAT)
class MadeUpLoader(BaseModelLoader):  # type: ignore[misc]
    """Reads nothing."""

    def download_model(self, model_config: Any) -> None:
        """Nothing to download."""

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Fills the parameters that a pool's engine fills, each from its own name."""
        parameters = dict(model.named_parameters())
        for name in compat.optional_parameters(model):
            del parameters[name]
        MadeUpWeights().fill(None, parameters)


class WorkerExtension:
    """For ``worker_extension_cls``: every worker imports this module for it, before it loads, and so has the loader."""


ENGINE_ARGUMENTS = {"load_format": LOAD_FORMAT, "worker_extension_cls": f"{__name__}.{WorkerExtension.__name__}"}
