"""sidp_runtime: one copy of a model's weights in a data-parallel group of inference replicas (SiDP, arXiv 2605.28095).

Importing starts nothing: no thread, no device, no network.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from . import errors
from ._C import Mode
from .group import Group
from .machine_profile import MachineProfile
from .manifest import LayerSpec, TensorSpec
from .ops import Op
from .placement import Placement
from .policy import ModePolicy

if TYPE_CHECKING:
    from .planner import Planner
    from .runtime import Runtime, Step
    from .weight_pool import WeightPool

__version__ = "0.1.0"

__all__ = [
    "Group",
    "LayerSpec",
    "MachineProfile",
    "Mode",
    "ModePolicy",
    "Op",
    "Placement",
    "Planner",
    "Runtime",
    "Step",
    "TensorSpec",
    "WeightPool",
    "errors",
]

# All but Planner import torch, which takes seconds; commands that do not need it shall not pay for it.
_LAZY = {"Planner": "planner", "Runtime": "runtime", "Step": "runtime", "WeightPool": "weight_pool"}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
