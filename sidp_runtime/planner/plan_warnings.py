"""What a plan warns of, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import _C
from . import memory
from .step_time import CAS_MEASURED_REPLICAS

if TYPE_CHECKING:
    from .planner import Plan
    from .workload import Workload

LOADED_MODEL_TYPES = ("llama", "qwen2", "qwen3")  # by integrations/transformers.py; compared by a test


def warnings_of(plan: Plan, longest: Workload, step_tokens: int) -> list[str]:
    """``longest``: of the plan's workloads; ``step_tokens``: the most tokens of a step."""
    shape, gpu, replicas, settings = plan.shape, plan.gpu, plan.replicas, plan.settings
    dp, best, cas = plan.dp, plan.best, plan.cas
    found = list(shape.notes)
    if best.tokens_per_s is None:
        found.append(f"SiDP does not fit a sequence of {longest.context} tokens; another scheme does")
    elif dp.tokens_per_s is not None and best.tokens_per_s <= dp.tokens_per_s:
        loss = 1 - best.tokens_per_s / dp.tokens_per_s
        found.append(
            f"SiDP loses {loss:.1%} to plain DP even with {best.num_resident} of {shape.num_layers} layers "
            f"resident: {best.tokens_per_s:.0f} against {dp.tokens_per_s:.0f} tokens/s. Run plain DP"
        )
    for scheme in plan.tp:
        if best.tokens_per_s and scheme.tokens_per_s and scheme.tokens_per_s > best.tokens_per_s:
            found.append(
                f"{scheme.name} is predicted {scheme.tokens_per_s / best.tokens_per_s - 1:.1%} faster than SiDP "
                f"({scheme.tokens_per_s:.0f} tokens/s), by an estimate"
            )
    if cas is not None and cas.times is not None:
        found.append(
            f"* CaS was measured with up to {CAS_MEASURED_REPLICAS} replicas, not with {replicas}, and "
            f"decides nothing: {cas.times.cas_s * 1e3:.1f} ms a step of at most {settings.max_rows} rows, "
            "prompts in chunks, if they too follow each other through the owners (--cas-rows 0 leaves it out)"
        )
    if best.mode == _C.Mode.CAS.name:
        found.append(
            f"SiDP is planned in CaS{',' if plan.job else ', prompts in chunks,'} in steps of up to "
            f"{settings.max_rows} rows. How long replicas wait for each other "
            "there is fitted to vLLM on two H200, and elsewhere a guess"
        )
    if gpu.nvlink_domain is not None and replicas > gpu.nvlink_domain:
        found.append(
            f"{replicas} replicas are more than the {gpu.nvlink_domain} of one NVLink domain of "
            f"{gpu.name}; links between domains are slower than planned"
        )
    if replicas > _C.LARGEST_SIMULATED:
        found.append(f"waiting at owners' links was simulated for {_C.LARGEST_SIMULATED} replicas, not {replicas}")
    if gpu.origin != "measured":
        found.append(f"{gpu.name}: no measurement; rates are a datasheet's, scaled (docs/model.md)")
    sampled = int(best.batch * (1 + 1 / plan.workload.output_tokens)) + 1
    needed = memory.activation_bytes(shape, step_tokens, sampled)
    if needed > settings.workspace_bytes:
        found.append(
            f"activations of a step need about {needed / 2**30:.1f} GiB, the workspace is "
            f"{settings.workspace_bytes / 2**30:.1f} GiB: raise it or lower step_tokens"
        )
    if shape.model_type not in LOADED_MODEL_TYPES:
        found.append(
            f"model type {shape.model_type!r} is planned, but the transformers integration loads only "
            f"{', '.join(LOADED_MODEL_TYPES)}"
        )
    return found
