"""Planner: what a SiDP group would hold and how fast it would step, before anything is bought, loaded or started.

    plan = Planner(ModelShape.read("Qwen/Qwen3-32B"), GpuProfile.read("H200"), replicas=8).plan(Workload(2048, 512))

Pure functions of a model's config, a GPU profile and a workload; ``docs/model.md`` derives every formula.
"""

from ..machine_profile import LinearTimes
from .gpus import GpuProfile, bundled_gpus
from .memory import DeviceMemory, MemorySettings
from .model_shape import ModelShape, bundled_models
from .planner import Plan, Planner, Scheme, Thresholds
from .step_time import StepLoad, StepTimes, Streamed
from .workload import Workload

__all__ = [
    "DeviceMemory",
    "GpuProfile",
    "LinearTimes",
    "MemorySettings",
    "ModelShape",
    "Plan",
    "Planner",
    "Scheme",
    "StepLoad",
    "StepTimes",
    "Streamed",
    "Thresholds",
    "Workload",
    "bundled_gpus",
    "bundled_models",
]
