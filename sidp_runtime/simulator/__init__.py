"""A discrete-event simulator of a group's steps: replicas, rings, lanes and the links between owners and pullers.

``README.md`` beside this file has the model, its assumptions and what it reproduces. Needs neither torch nor a GPU.
"""

from .config import LayerTime, SimulationConfig
from .result import ReplicaResult, SimulationResult, Span, SpanKind, StepResult
from .simulate import simulate

__all__ = [
    "LayerTime",
    "ReplicaResult",
    "SimulationConfig",
    "SimulationResult",
    "Span",
    "SpanKind",
    "StepResult",
    "simulate",
]
